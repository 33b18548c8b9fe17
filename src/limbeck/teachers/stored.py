"""A teacher whose signals are read from a store."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from limbeck.batch import Batch, sent
from limbeck.data import TextData
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError
from limbeck.files import expanded, manifest
from limbeck.losses import Objective, SignalNeeds, TeacherSignal
from limbeck.losses.distributions import LazyLogits, TeacherDistribution
from limbeck.models import PreTrainedTokenizerBase
from limbeck.store import TOKENIZER, Record, Sample, Store
from limbeck.teachers.ahead import Ahead
from limbeck.teachers.base import (
    DISTRIBUTION,
    Teacher,
    TeacherInfo,
    TeacherRequest,
    TextWindows,
    teachers,
)
from limbeck.tokenizers import load_tokenizer, template_hash, tokenizer_hash

CPU = torch.device("cpu")

AHEAD_POSITIONS = 32_768
"""Positions that are decoded ahead: about 30 MB of top-64, 1 GB of 8,192 hidden states."""


class StoredTeacher(Teacher):
    """Signals of a store, looked up window by window; no model is loaded.

    A batch is cut back into the windows it was packed from, so packing, order, micro-batches and
    ranks may differ from the recording. A changed text, token or scored position raises an error
    instead of returning another text's signal. Windows announced by `prefetch` are read from disk,
    verified and decoded in the background.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store = store
        self._device = device
        head = store.head
        if head is not None:
            bias = None if head.bias is None else head.bias.to(device)
            head = head._replace(weight=head.weight.to(device), bias=bias)
        self._head = head
        self._needs = DISTRIBUTION
        self._decoder = ThreadPoolExecutor(2, "store")
        self._ahead = self._reading_ahead()

    @cached_property
    def info(self) -> TeacherInfo:
        """Name, revision, hash and shape of the recorded model, and the form of the store."""
        header = self.store.header
        recorded = {
            "form": dict(header.form),
            "tokens": self.store.num_scored,
            "sha256": header.sha256,
        }
        return TeacherInfo.from_json({**header.teacher, "recorded": recorded})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the store carries.

        Raises:
            DataError: It is missing, damaged, or not the one named by the header.
        """
        folder = self.store.path / TOKENIZER
        if manifest(folder) is None:
            raise DataError(
                f"The store {self.store.path} must have the teacher's tokenizer in {folder}, which "
                "is missing or damaged. Copy it from another part of the same recording, or record "
                "again."
            )
        tokenizer = load_tokenizer(str(folder))
        if differing := self.store.header.differences(hashes(tokenizer)):
            raise DataError(
                f"{folder} is not what the store was recorded with ({'; '.join(differing)}). Copy "
                "the folder from another part of the same recording, or record again."
            )
        return tokenizer

    def require(self, request: TeacherRequest) -> None:
        """Compare the store with everything the run will read from it.

        Raises:
            ConfigError: Tokenizer, template, vocabulary, layers, form or a temperature differ, or
                text is generated during the run.
            DataError: Windows are missing; how many, and the first of them.
        """
        if request.generated:
            raise ConfigError(
                "teacher.type: text that is generated during the run needs a teacher that can read "
                "it, and a stored teacher has signals for its recorded text only. Name the model: "
                "teacher='{type: online, path: ...}', or remove `rollout`."
            )
        if request.student_tokenizer is not None:
            self._require_tokenizer(request.student_tokenizer, uses_template=request.uses_template)
        if request.vocabulary_size is not None:
            self._require_vocabulary(request.vocabulary_size)
        for text in request.texts:
            self._require_windows(text)
        self._require_layers(request.needs)
        self._needs = request.needs
        self._ahead = self._reading_ahead()
        if request.whole_vocabulary:
            self._require_whole_vocabulary()
        if request.measured:
            self._require_measurable()
        if request.objective is not None:
            self._require_terms(request.objective)
        self._require_temperatures(request.temperatures)

    @property
    def works_ahead(self) -> bool:
        """Whether records of the next step are decoded while the student computes."""
        return self._needs.distribution or bool(self._needs.layers)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Decode the records of these batches in the background, in their order."""
        if self.works_ahead:
            self._ahead.announce(batches)

    def _reading_ahead(self) -> Ahead[Record]:
        layers = self._needs.layers

        def start(sample: Sample) -> Future[Record]:
            return self._decoder.submit(self.store.read, sample.key, layers)

        return Ahead(start, most_positions=AHEAD_POSITIONS)

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """The recorded signal of a batch's windows.

        Raises:
            DataError: A window is not in the store, or its record is damaged.
        """
        if not self.works_ahead:
            return TeacherSignal()
        records = [record for _, record in self._ahead.take(batch)]
        if records:
            return self._joined(records)
        # A rank without work gets an empty signal of the same form.
        signal = self._joined([self.store.read(next(self.store.keys()), self._needs.layers)])
        nothing = slice(0, 0)
        return TeacherSignal.from_distribution(
            None if signal.distribution is None else signal.distribution.rows(nothing),
            {layer: states[nothing] for layer, states in signal.layer_hidden.items()},
        )

    def _joined(self, records: list[Record]) -> TeacherSignal:
        distribution: TeacherDistribution | None = None
        if self._needs.distribution and self._head is not None:
            # Hidden states are moved; the head is on the device already.
            lazy = self.store.join(records)
            assert isinstance(lazy, LazyLogits)
            hidden, dtype = sent(lazy.hidden, self._device), self._head.weight.dtype
            if hidden.dtype.itemsize == dtype.itemsize == 2:
                # Of float16 and bfloat16 the product is float32, with a copy of the whole head.
                hidden = hidden.to(dtype)
            distribution = LazyLogits(hidden, self._head)
        elif self._needs.distribution:
            distribution = self.store.join(records, self._device)
        layers = {
            layer: sent(torch.cat([record.layers[layer] for record in records]), self._device)
            for layer in sorted(self._needs.layers)
        }
        return TeacherSignal.from_distribution(distribution, layers)

    def _require_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, *, uses_template: bool
    ) -> None:
        wanted = hashes(tokenizer)
        if not uses_template:
            del wanted["template"]
        if differing := self.store.header.differences(wanted):
            raise ConfigError(
                f"The student must read text as the store {self.store.path} was recorded, and does "
                f"not: {'; '.join(differing)}. Take a student with the teacher's tokenizer and "
                "template, or record the store again with those of the student."
            )

    def _require_vocabulary(self, size: int) -> None:
        recorded = self.store.header.vocabulary_size
        if recorded != size:
            raise ConfigError(
                f"vocabulary_size: {recorded:,} in the store {self.store.path}, and student and "
                f"teacher share {size:,} tokens. Record again with the tokenizer they share."
            )

    def _require_windows(self, text: TextWindows) -> None:
        data, store = text.data, self.store
        missing = [each for each in text.windows if window_of(data, each).key not in store]
        if not missing:
            return
        first = data.document_name(int(data.windows[missing[0], 2]))
        recorded, wanted = store.header.sequence_length, int(data.facts["sequence_length"])
        cut = ""
        if recorded != wanted:
            cut = f" (sequence_length: {recorded} in the store, {wanted} wanted)"
        raise DataError(
            f"{text.option}: every window must be in the store {store.path}, and {len(missing):,} "
            f"of {len(text.windows):,} are not; the first is of {first}{cut}. The text, the way it "
            "is cut, or what is scored of it is not what was recorded. Record this data with "
            "`limbeck record`, or use the data that was recorded."
        )

    def _require_layers(self, needs: SignalNeeds) -> None:
        if needs.projections:
            raise ConfigError(
                "The objective reads queries, keys and values of the teacher's layers "
                f"{sorted(needs.projections)}, and no store holds those ({self.store.path}). Use "
                "`teacher: {type: online}`, or leave out the term that reads them."
            )
        recorded = self.store.header.layers
        if absent := sorted(needs.layers - set(recorded)):
            raise ConfigError(
                f"The objective reads the teacher's layers {absent}, and the store "
                f"{self.store.path} holds layers {list(recorded) or 'none'}. Record again with "
                "record.layers, or leave out the term that reads them."
            )

    def _require_whole_vocabulary(self) -> None:
        if self._head is None:
            raise ConfigError(
                "A mixture of teachers needs distributions over the whole vocabulary, and the "
                f"store {self.store.path} holds {self.store.header.form['type']}. Record again "
                "with `record.form: {type: hidden}`, or use `teacher: {type: online, path: ...}`."
            )

    def _require_terms(self, objective: Objective) -> None:
        """Compute every logit term once, on one recorded position."""
        position = self._one_position()
        if self._needs.distribution:
            objective.try_terms(self.store.header.vocabulary_size, position)

    def _require_temperatures(self, temperatures: tuple[float, ...]) -> None:
        position = self._one_position()
        if isinstance(position, LazyLogits):
            return  # whole distributions serve every temperature
        logits = torch.zeros(1, self.store.header.vocabulary_size)
        for temperature in temperatures:
            position.compare(logits, temperature)

    def _require_measurable(self) -> None:
        try:
            self._require_temperatures((1.0,))
        except ConfigError as error:
            raise ConfigError(
                "evaluate.data: students are measured at temperature 1, which the store "
                f"{self.store.path} does not serve. Record with 1.0 among the temperatures, or set "
                "evaluate.data=null and measure afterwards: limbeck evaluate, with the online "
                "teacher."
            ) from error

    def _one_position(self) -> TeacherDistribution:
        first = self.store.distribution([next(self.store.keys())])
        return first.rows(slice(0, 1)).to(CPU)


def hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of a tokenizer and its template, under the names of a store's header."""
    return {"tokenizer": tokenizer_hash(tokenizer), "template": template_hash(tokenizer)}


def window_of(data: TextData, window: int) -> Sample:
    """A window of a text as the store identifies it."""
    start, length, _ = data.windows[window].tolist()
    return Sample(
        np.asarray(data.tokens[start : start + length + 1]),
        np.asarray(data.scored[start + 1 : start + length + 1]),
    )


@teachers.register("stored")
def stored(world: World, *, path: str) -> StoredTeacher:
    """A teacher recorded with `limbeck record`: no forward pass, no teacher in memory.

    Args:
        path: Folder of the store.
    """
    return StoredTeacher(Store.open(expanded(path)), world.device)
