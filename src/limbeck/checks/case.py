"""The pair on trial, a sample of its text, and what both models say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig
from limbeck.losses import Projections, StudentView, TeacherSignal
from limbeck.losses.distributions import LazyLogits
from limbeck.models import CausalLM, Distiller, captured_projections, evaluating
from limbeck.teachers import LocalTeacher
from limbeck.tokenizers import VocabularyProof

ROWS = 4
"""Rows of the sample, spread over the text."""

POSITIONS = 128
"""Positions of a row that are kept; more where a prompt is longer."""

SCORED = 80
"""Scored positions that are looked at one by one; more than one chunk of the fused head."""


@runtime_checkable
class Rows(Protocol):
    """What proofs ask of training text; `TextData` is one."""

    @property
    def num_rows(self) -> int:
        """Rows it can give."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some of the rows."""


@dataclass(frozen=True)
class Case:
    """The pair on trial.

    Attributes:
        distiller: Student and objective, on their device, whole (not sharded).
        recipe: What the recipe says the objective is; proofs compute it in the open.
        teacher: Its weights are in this process.
        data: Training text.
        largest_token_id: In the whole text.
        vocabulary: What the two tokenizers share.
    """

    distiller: Distiller
    recipe: ObjectiveConfig
    teacher: LocalTeacher
    data: Rows
    largest_token_id: int
    vocabulary: VocabularyProof

    @property
    def student(self) -> CausalLM:
        """The student's model."""
        return self.distiller.student

    @property
    def teacher_model(self) -> CausalLM:
        """The teacher's model."""
        return self.teacher.model

    @property
    def models(self) -> tuple[tuple[str, CausalLM], ...]:
        """Both models by name."""
        return ("teacher", self.teacher_model), ("student", self.student)

    @property
    def device(self) -> torch.device:
        """Where all is computed."""
        return self.student.hf_model.device

    def sample(self) -> Batch:
        """The beginnings of a few rows, each scored at another density.

        Unequal counts are what tells a mean over tokens from a mean of means.
        """
        rows = spread(self.data.num_rows, ROWS)
        return uneven(shortened(self.data.batch(rows), POSITIONS)).to(self.device)


@dataclass(frozen=True)
class Views:
    """What both models say at a few scored positions; nothing in it has a graph."""

    student: StudentView
    distribution: LazyLogits
    signal: TeacherSignal


def spread(num_rows: int, count: int) -> list[int]:
    """So many rows, or all, evenly over the text.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    count = min(count, num_rows)
    return [i * num_rows // count for i in range(count)]


def shortened(batch: Batch, positions: int) -> Batch:
    """The first positions of each row; more when a row's first scored positions come later."""
    late = [int(row.int().argmax()) + 16 for row in batch.scored if row.any()]
    length = max(positions, *late) if late else positions
    return part(batch, slice(None), slice(0, length))


def uneven(batch: Batch) -> Batch:
    """The same rows, of whose scored positions row i keeps every (i + 1)-th."""
    place = batch.scored.cumsum(1) - 1
    every = torch.arange(1, len(batch.scored) + 1, device=batch.scored.device)[:, None]
    kept = batch.scored & (place % every == 0)
    return Batch(batch.input_ids, batch.target_ids, kept, batch.position_ids, batch.document_ids)


def part(batch: Batch, rows: slice, positions: slice = slice(None)) -> Batch:
    """Some rows and positions of a batch; a row must be cut at its end only."""

    def cut(values: Tensor) -> Tensor:
        return values[rows, positions]

    return Batch(
        cut(batch.input_ids),
        cut(batch.target_ids),
        cut(batch.scored),
        cut(batch.position_ids),
        cut(batch.document_ids),
    )


def view(case: Case, batch: Batch, count: int = SCORED) -> Views:
    """Both models' hidden states and heads at some of the batch's scored positions."""
    objective = case.distiller.objective
    with torch.no_grad(), evaluating(case.distiller), evaluating(case.teacher_model):
        with captured_projections(
            case.student, batch.scored, objective.student_projections
        ) as projections:
            hidden, layers = case.student(batch, objective.student_layers)
        with captured_projections(
            case.teacher_model, batch.scored, objective.needs.projections
        ) as teacher_projections:
            teacher_hidden, teacher_layers = case.teacher_model(batch, objective.needs.layers)
    every = max(1, len(hidden) // count)
    some = slice(0, every * count, every)
    distribution = LazyLogits(teacher_hidden[some], case.teacher_model.head.detach())
    chosen = {i: states[some] for i, states in layers.items()}
    teacher_chosen = {i: states[some] for i, states in teacher_layers.items()}
    return Views(
        StudentView(
            hidden[some],
            case.student.head.detach(),
            chosen,
            batch.targets()[some],
            segments=batch.segments()[some],
            layer_projections=at_some(projections, some),
        ),
        distribution,
        TeacherSignal.from_distribution(
            distribution, teacher_chosen, at_some(teacher_projections, some)
        ),
    )


def at_some(
    layers: Mapping[int, Projections], some: slice, dtype: torch.dtype | None = None
) -> dict[int, Projections]:
    """Queries, keys and values at some of the positions; in another number format if given."""
    return {i: Projections(*(part[some].to(dtype) for part in each)) for i, each in layers.items()}
