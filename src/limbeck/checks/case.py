"""Inputs of the checks: both models, a sample of the text, and their outputs on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from limbeck.batch import Batch
from limbeck.config import ObjectiveConfig
from limbeck.data import spread
from limbeck.data.source import Rows
from limbeck.losses import Projections, StudentView, TeacherSignal
from limbeck.losses.distributions import LazyLogits
from limbeck.losses.head.likelihood import with_likelihoods
from limbeck.models import CausalLM, Distiller, captured_projections, evaluating
from limbeck.teachers import Teacher
from limbeck.tokenizers import VocabularyProof

ROWS = 4
"""Rows of the sample, spread over the text."""

POSITIONS = 128
"""Positions of a row that are kept; more where a prompt is longer."""

SCORED = 80
"""Scored positions compared in detail; more than one chunk of the fused head."""


@dataclass(frozen=True)
class Case:
    """Teacher, student, objective and text to check.

    Attributes:
        distiller: Student and objective, on their device; sharded or not.
        recipe: The objective's configuration, from which the plain formula is computed.
        teacher_model: The teacher's weights, which are here.
        allow_worse_teacher: Whether the teacher may predict the text worse than the student.
    """

    distiller: Distiller
    recipe: ObjectiveConfig
    teacher: Teacher
    teacher_model: CausalLM
    data: Rows
    largest_token_id: int
    vocabulary: VocabularyProof
    allow_worse_teacher: bool = False

    @property
    def student(self) -> CausalLM:
        """The student's model."""
        return self.distiller.student

    @property
    def models(self) -> tuple[tuple[str, CausalLM], ...]:
        """Both models by name."""
        return ("teacher", self.teacher_model), ("student", self.student)

    @property
    def device(self) -> torch.device:
        """Device of both models."""
        return self.student.hf_model.device

    def sample(self) -> Batch:
        """The beginnings of a few rows, each with another share of scored positions.

        Unequal counts distinguish a mean over tokens from a mean of means.
        """
        rows = spread(self.data.num_rows, ROWS)
        return uneven(shortened(self.data.batch(rows), POSITIONS)).to(self.device)


@dataclass(frozen=True)
class Views:
    """Outputs of both models at a few scored positions, without gradients."""

    student: StudentView
    distribution: LazyLogits
    signal: TeacherSignal

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Views:
        """The same at some of the positions; in another number format if `dtype` is given."""
        old, signal = self.student, self.signal
        weights, segments = old.token_weights, old.segments
        student = StudentView(
            old.hidden[rows].to(dtype),
            old.head if dtype is None else old.head.to(dtype),
            {i: states[rows].to(dtype) for i, states in old.layer_hidden.items()},
            old.targets[rows],
            None if weights is None else weights[rows].to(dtype),
            None if segments is None else segments[rows],
            projections_at(old.layer_projections, rows, dtype),
        )
        head = self.distribution.head if dtype is None else self.distribution.head.to(dtype)
        distribution = LazyLogits(self.distribution.hidden[rows].to(dtype), head)
        layers = {i: states[rows].to(dtype) for i, states in signal.layer_hidden.items()}
        projections = projections_at(signal.layer_projections, rows, dtype)
        whole = TeacherSignal.from_distribution(distribution, layers, projections)
        if signal.likelihoods is not None:
            whole = with_likelihoods(whole, distribution.hidden, head, student.targets)
        return Views(student, distribution, whole)


def shortened(batch: Batch, positions: int) -> Batch:
    """The first positions of each row; more when a row's first scored positions come later."""
    late = [int(row.int().argmax()) + 16 for row in batch.scored if row.any()]
    length = max(positions, *late) if late else positions
    return batch.part(slice(None), slice(0, length))


def uneven(batch: Batch) -> Batch:
    """The same rows; row i keeps every (i + 1)-th of its scored positions."""
    place = batch.scored.cumsum(1) - 1
    every = torch.arange(1, len(batch.scored) + 1, device=batch.scored.device)[:, None]
    kept = batch.scored & (place % every == 0)
    return replace(batch, scored=kept)


def view(case: Case, batch: Batch, count: int = SCORED) -> Views:
    """Hidden states and heads of both models at about `count` of the batch's scored positions."""
    objective = case.distiller.objective
    with torch.no_grad(), evaluating(case.distiller), evaluating(case.teacher_model):
        student = case.distiller.view(batch)
        with captured_projections(
            case.teacher_model, batch, objective.needs.projections
        ) as teacher_projections:
            teacher_hidden, teacher_layers = case.teacher_model(batch, objective.needs.layers)
    student = replace(student, head=student.head.detach())
    distribution = LazyLogits(teacher_hidden, case.teacher_model.head.detach())
    signal = TeacherSignal.from_distribution(distribution, teacher_layers, teacher_projections)
    if objective.needs.likelihoods:
        signal = with_likelihoods(signal, teacher_hidden, distribution.head, batch.targets())
    every = max(1, len(student.hidden) // count)
    return Views(student, distribution, signal).rows(slice(0, every * count, every))


def projections_at(
    layers: Mapping[int, Projections], rows: slice, dtype: torch.dtype | None
) -> dict[int, Projections]:
    """Queries, keys and values at chosen positions, converted to `dtype` if it is not None."""
    return {i: Projections(*(part[rows].to(dtype) for part in each)) for i, each in layers.items()}
