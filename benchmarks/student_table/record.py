"""The teacher's one pass: all windows that any cell learns from or is measured on, in one store."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from limbeck import __version__
from limbeck.config import DataConfig, EvaluateConfig
from limbeck.data import TextData, corpus_path, load_data
from limbeck.data.held_out import HeldOut
from limbeck.data.order import permutation
from limbeck.distributed import World
from limbeck.losses import SignalNeeds
from limbeck.models import PreTrainedTokenizerBase, cache_folder
from limbeck.recording.plan import plan_shards
from limbeck.recording.progress import RecordingProgress
from limbeck.recording.record import Recorder
from limbeck.store import Store, StoreHeader
from limbeck.teachers import TeacherRequest, TextWindows, teachers
from limbeck.tokenizers import load_tokenizer, template_hash, tokenizer_hash
from student_table.plan import ROW, STEP

DECIDING = 1600
"""Held-out positions on which a learning rate is chosen, where there are several."""
SHARD = 4096


@dataclass(frozen=True)
class Texts:
    """What is read.

    Attributes:
        tokenizer: The teacher's.
        train: The whole corpus; a cell reads some of its rows.
        held_out: Other documents.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TextData
    held_out: HeldOut

    def rows(self, seed: int, steps: int) -> list[int]:
        """Rows of the corpus that the cells of a seed learn from."""
        count = min(steps * STEP // ROW, self.train.num_rows)
        return [int(row) for row in permutation(seed, 0, self.train.num_rows)[:count]]

    def some(self, seed: int, steps: int) -> TextData:
        """Those rows as a text of their own."""
        ends = self.train.row_ends
        kept = [
            self.train.row_windows[(int(ends[row - 1]) if row else 0) : int(ends[row])]
            for row in self.rows(seed, steps)
        ]
        windows = np.asarray(self.train.windows)[np.concatenate(kept)]
        return dataclasses.replace(
            self.train,
            windows=windows,
            row_windows=np.arange(len(windows)),
            row_ends=np.cumsum([len(each) for each in kept]),
        )


def open_texts(told: argparse.Namespace, row: int = ROW) -> Texts:
    """Corpus and held-out text, tokenised.

    Args:
        told: The command line, with `teacher` and `held_out`.
        row: Positions of a row.
    """
    tokenizer = load_tokenizer(str(told.teacher))
    cache = cache_folder() / "data"

    def read(part: Any, *, pack: bool) -> TextData:
        config = DataConfig(
            type="text", path=str(corpus_path(part)), sequence_length=row, pack=pack
        )
        return load_data(config, tokenizer, cache=cache, max_positions=None)

    measured = EvaluateConfig(max_tokens=told.held_out, max_tokens_during=DECIDING)
    return Texts(
        tokenizer, read("train", pack=True), HeldOut(read("heldout", pack=False), measured)
    )


def open_store(
    told: argparse.Namespace, texts: Texts, steps: int, layers: bool, world: World
) -> Store:
    """The teacher's last hidden states, and all its layers' where a term reads them; exact.

    Recorded unless it is there; stopped or killed, it goes on.
    """
    learnt = [texts.some(seed, steps) for seed in range(told.seeds)]
    every: Iterable[TextWindows] = (
        TextWindows("data", text, range(len(text.windows))) for text in learnt
    )
    held = texts.held_out
    plan = plan_shards([*every, TextWindows("evaluate.data", held.data, held.windows)], SHARD)
    name = hashlib.sha256(f"{plan.data_hash} {layers} {told.teacher}".encode()).hexdigest()[:12]
    folder = told.work / f"store-{name}"
    teacher = teachers.bind({"type": "online", "path": str(told.teacher)}, "teacher")(
        world.unsharded
    )
    size, recorded = 1 + max(texts.tokenizer.get_vocab().values()), range(teacher.info.layers)
    layer_ids = tuple(recorded) if layers else ()
    needs = SignalNeeds(distribution=True, layers=frozenset(layer_ids))
    teacher.require(TeacherRequest(needs=needs, vocabulary_size=size))
    header = StoreHeader(
        form={"type": "hidden", "precision": "exact"},
        vocabulary_size=size,
        num_shards=len(plan.shards),
        teacher=teacher.info.to_json(),
        tokenizer=tokenizer_hash(texts.tokenizer),
        template=template_hash(texts.tokenizer),
        data=plan.data_hash,
        sequence_length=ROW,
        layers=layer_ids,
        limbeck=__version__,
    )
    recorder = Recorder(teacher, plan, header, folder, world)
    recorder.begin(texts.tokenizer)
    left = recorder.left(range(len(plan.shards)))
    total = sum(place.positions for shard in left for place in plan.shards[shard])
    progress = RecordingProgress(Console(stderr=True), total)
    recorder.record(left, progress, lambda: None)
    progress.close()
    return Store.open(folder)
