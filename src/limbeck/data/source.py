"""Batch sources: the batches a rank reads in each optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from limbeck.batch import Batch
from limbeck.data.order import MixedOrder, Portion, one_order, step_span
from limbeck.data.text_data import TextData
from limbeck.distributed import World
from limbeck.errors import DataError
from limbeck.registry import Registry


class StepData(ABC):
    """One rank's share of one optimizer step, which may be cut into batches more than once."""

    @abstractmethod
    def cut(self, micro_batch: int) -> list[Batch]:
        """The share as CPU batches of at most `micro_batch` rows.

        Every rank must return as many; the last ones may have nothing scored.
        """

    def row_numbers(self, micro_batch: int) -> list[list[int]]:
        """For messages: numbers of the rows in each batch of `cut`; counted up by default."""
        numbers, first = [], 0
        for batch in self.cut(micro_batch):
            numbers.append(list(range(first, first + len(batch.input_ids))))
            first += len(batch.input_ids)
        return numbers

    @property
    def metrics(self) -> Mapping[str, float]:
        """Figures of the whole step for metrics.jsonl, where rank 0's are kept; none by default."""
        return {}

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know about the step now, on rank 0; nothing by default."""
        return ()


class BatchSource(ABC):
    """The training text of a run, as a pure function of the step."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything its batches depend on; resuming compares it with the checkpoint's."""

    @abstractmethod
    def step(self, step: int, world: World) -> StepData:
        """One rank's share of an optimizer step, counted from 0."""

    def ahead(self, step: int, world: World) -> StepData | None:
        """What is known of a later step before those in between were taken; nothing by default."""
        del step, world
        return None

    def document_name(self, document: int) -> str:
        """Where a document of `Batch.document_ids` comes from, for messages."""
        return f"document {document}"


@runtime_checkable
class Rows(Protocol):
    """A fixed text, packed into rows; `TextData` is one."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers; for none, one row with nothing scored."""

    def document_name(self, document: int) -> str:
        """Where a document comes from, for messages."""


@dataclass(frozen=True)
class SourceContext:
    """What a batch source is made from.

    Attributes:
        data: The text of the recipe's `data` section.
        tokenizer: The teacher's.
        rows_per_step: Rows of one optimizer step, over all ranks.
        sequence_length: Positions of a row, at most.
    """

    data: TextData
    tokenizer: PreTrainedTokenizerBase
    seed: int
    rows_per_step: int
    sequence_length: int


sources: Registry[BatchSource] = Registry("batch source", package="limbeck.data")
"""Factories `(context: SourceContext, *, options) -> BatchSource`."""


@dataclass(frozen=True)
class RowsOfStep(StepData):
    """Some rows of a fixed text.

    Attributes:
        rows: Numbers of this rank's rows.
        most_rows: Rows of the rank that has most.
    """

    data: Rows
    rows: Sequence[int]
    most_rows: int

    def cut(self, micro_batch: int) -> list[Batch]:
        return [self.data.batch(rows) for rows in self.row_numbers(micro_batch)]

    def row_numbers(self, micro_batch: int) -> list[list[int]]:
        """Rows of each micro-batch, as many on every rank; the last ones may be empty."""
        starts = range(0, max(1, self.most_rows), micro_batch)
        return [list(self.rows[start : start + micro_batch]) for start in starts]


class ShuffledRows(BatchSource):
    """The rows of a fixed text, in a new order each epoch that depends on the seed alone."""

    def __init__(
        self, data: Rows, *, seed: int, rows_per_step: int, portions: Sequence[Portion] = ()
    ) -> None:
        """
        Args:
            portions: Of a mixture, the rows of each source and their share of every step.
        """
        if data.num_rows < 1:
            raise DataError("A run needs at least one row of data, got none. See data.path.")
        self._data, self._rows_per_step = data, rows_per_step
        self._order = MixedOrder(seed, portions) if portions else one_order(seed, data.num_rows)

    @property
    def fingerprint(self) -> str:
        """Hash of the first epoch's order; the text itself is compared by its own hash."""
        return self._order.digest

    def step(self, step: int, world: World) -> StepData:
        rows = self._order.rows(*step_span(step, world.rank, world.size, self._rows_per_step))
        return RowsOfStep(self._data, rows, math.ceil(self._rows_per_step / world.size))

    def ahead(self, step: int, world: World) -> StepData:
        """All of it."""
        return self.step(step, world)

    def document_name(self, document: int) -> str:
        return self._data.document_name(document)


@sources.register("shuffled")
def shuffled(context: SourceContext) -> ShuffledRows:
    """The rows of the text, shuffled again in every epoch; of a mixture, its sources by weight."""
    data = context.data
    return ShuffledRows(
        data, seed=context.seed, rows_per_step=context.rows_per_step, portions=data.portions
    )
