"""The recorder: writes the shards of a plan, each published complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from limbeck.batch import Batch, Window
from limbeck.distributed import World, gather_objects, together
from limbeck.files import locked
from limbeck.losses import TeacherSignal
from limbeck.models import PreTrainedTokenizerBase
from limbeck.recording.plan import PlannedWindow, ShardPlan, passes
from limbeck.recording.progress import RecordingProgress
from limbeck.store import (
    TOKENIZER,
    Sample,
    ShardWriter,
    StoreHeader,
    create,
    generator_of,
    publish_once,
    shard_facts,
    write_head,
)
from limbeck.teachers import Teacher, find_local

CREATION_TIMEOUT_S = 600.0
"""How long to wait for another process that creates the same store: it may write a head of GBs."""


ROWS_AHEAD = 32
"""Passes announced to a teacher that works ahead; their signals are in memory."""


class Recorder:
    """Records the shards that are not published yet.

    The bytes of a shard depend on plan, header and teacher only: not on other processes, earlier
    interruptions or the order of recording.
    """

    def __init__(
        self,
        teacher: Teacher,
        plan: ShardPlan,
        header: StoreHeader,
        folder: Path,
        world: World,
    ) -> None:
        """
        Args:
            teacher: Required to give distributions over the header's vocabulary, and its layers.
            world: The ranks that record together; each gets shards of its own.
        """
        self._teacher = teacher
        self._plan = plan
        self._header = header
        self._folder = folder
        self._world = world
        self._form = header.make_form()

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Create the store, or check that the existing one is of the same teacher and data.

        The teacher's head must be gathered (`Teacher.restore`).
        """
        taken = f"Another process is creating {self._folder}. Start again when it is done."
        with locked(self._folder / ".lock", taken, patience_s=CREATION_TIMEOUT_S):
            create(self._folder, self._header)
            put_tokenizer(self._folder, tokenizer)
            if self._form.needs_head:
                head = self._teacher.head
                assert head is not None, "the recording requires a form that the teacher serves"
                write_head(self._folder, head)

    def left(self, shards: Sequence[int]) -> list[int]:
        """Those of the shards that are not published."""
        return [shard for shard in shards if shard_facts(self._folder, shard) is None]

    def record(
        self, shards: Sequence[int], progress: RecordingProgress, check: Callable[[], None]
    ) -> None:
        """Record shards, one after another; every rank calls it, with shards of its own.

        A forward pass of a sharded teacher is a collective, so all ranks make the same number of
        passes: a rank that has recorded all of its shards reads padding until the others have.

        Args:
            progress: Counts the positions of all ranks.
            check: Every rank calls it between passes; an exception, which all ranks must raise
                alike, stops the recording and discards unfinished shards.
        """
        device, takes_part = self._world.device, find_local(self._teacher) is not None
        idle = Batch.packed([]).to(device)
        batch: Batch | None = None
        answer: TeacherSignal | None = None

        def advance() -> None:
            nonlocal batch
            try:
                batch = passes_of_rank.send(answer)
            except StopIteration:
                batch = None

        with closing(self._passes(shards, progress)) as passes_of_rank:
            together(advance, self._world)
            while positions := self._positions(batch):
                check()
                if batch is not None:
                    answer = self._teacher.signal(batch.to(device))
                elif takes_part:
                    self._teacher.signal(idle)
                together(advance, self._world)
                progress.advance(positions)

    def _positions(self, batch: Batch | None) -> int:
        """Positions of the next pass, over all ranks."""
        own = 0 if batch is None else batch.input_ids.numel()
        return sum(gather_objects(own, self._world))

    def _passes(
        self, shards: Sequence[int], progress: RecordingProgress
    ) -> Generator[Batch, TeacherSignal | None, None]:
        """Batches for the teacher; what it answers to one is sent in, and written."""
        for shard in shards:
            taken = (
                f"Only one process may record shard {shard} of {self._folder}, and another one "
                "does. Give each process its own part (--shards 1/2, --shards 2/2), or wait."
            )
            with locked(self._folder / f".lock-{shard:05d}", taken):
                if self.left([shard]):
                    yield from self._record(shard, progress)

    def _record(
        self, shard: int, progress: RecordingProgress
    ) -> Generator[Batch, TeacherSignal | None, None]:
        places = self._plan.shards[shard]
        scored = 0
        with ShardWriter(self._folder, shard, self._header) as writer:
            rows = list(passes(places, self._header.sequence_length))
            self._announce(rows[:ROWS_AHEAD])
            for number, row in enumerate(rows):
                samples = [self._plan.sample(place) for place in row]
                self._announce(rows[number + ROWS_AHEAD : number + ROWS_AHEAD + 1])
                answer = yield row_of(samples)
                assert answer is not None, "each batch is answered"
                scored += self._write(samples, answer, writer)
        progress.finished(shard, self._header.num_shards, scored, writer.record_bytes)

    def _announce(self, rows: Sequence[Sequence[PlannedWindow]]) -> None:
        """Announce the next batches to a teacher that prefetches."""
        if self._teacher.works_ahead:
            self._teacher.prefetch([row_of(list(map(self._plan.sample, row))) for row in rows])

    @torch.no_grad()
    def _write(self, samples: Sequence[Sample], answer: TeacherSignal, writer: ShardWriter) -> int:
        """Write one forward pass over windows that do not attend to each other; scored tokens."""
        distribution, layers = answer.distribution, answer.layer_hidden
        assert distribution is not None, "the recording requires distributions"
        start = 0
        for sample in samples:
            rows = slice(start, start + sample.num_scored)
            generator = generator_of(self._header.seed, sample.key)
            signal = self._form.read_teacher(distribution.rows(rows), generator)
            writer.add(sample, signal, {layer: states[rows] for layer, states in layers.items()})
            start = rows.stop
        return start


def put_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Publish the teacher's tokenizer in a store, unless it has one; see `publish_once`."""
    publish_once(folder / TOKENIZER, partial(save, tokenizer))


def save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files."""
    tokenizer.save_pretrained(folder)


def row_of(samples: Sequence[Sample]) -> Batch:
    """Samples packed into one row."""
    return Batch.packed([[Window(s.tokens, s.scored, i) for i, s in enumerate(samples)]])
