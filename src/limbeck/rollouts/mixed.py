"""Steps with rollouts and rows of fixed text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.batch import Batch
from limbeck.data import BatchSource, StepData
from limbeck.distributed import World
from limbeck.rollouts.source import Rollouts


class Mixed(BatchSource):
    """Rollouts and fixed text in every step; the rollouts come first."""

    def __init__(self, rollouts: Rollouts, fixed: BatchSource) -> None:
        self._rollouts, self._fixed = rollouts, fixed

    @property
    def fingerprint(self) -> str:
        """Hash of both parts."""
        both = f"{self._rollouts.fingerprint} {self._fixed.fingerprint}"
        return hashlib.sha256(both.encode()).hexdigest()

    def step(self, step: int, world: World) -> StepData:
        return MixedStep(self._rollouts.step(step, world), self._fixed.step(step, world))

    def ahead(self, step: int, world: World) -> StepData | None:
        """The fixed text; rollouts depend on the weights."""
        return self._fixed.ahead(step, world)

    def document_name(self, document: int) -> str:
        part = self._rollouts if document >= self._rollouts.first_number else self._fixed
        return part.document_name(document)


@dataclass(frozen=True)
class MixedStep(StepData):
    """One rank's share of a step in two parts, whose rows are in different micro-batches."""

    rollouts: StepData
    fixed: StepData

    def cut(self, micro_batch: int) -> list[Batch]:
        """Batches of rollouts, then of fixed text."""
        return [*self.rollouts.cut(micro_batch), *self.fixed.cut(micro_batch)]

    def row_numbers(self, micro_batch: int) -> list[list[int]]:
        parts = (self.rollouts, self.fixed)
        return [numbers for part in parts for numbers in part.row_numbers(micro_batch)]

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.rollouts.metrics

    @property
    def warnings(self) -> Sequence[str]:
        return self.rollouts.warnings
