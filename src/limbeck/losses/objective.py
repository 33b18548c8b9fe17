"""The objective: a weighted sum of terms, divided once by the scored tokens of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.config import HeadBudget
from limbeck.losses.distributions.base import Rows, TeacherDistribution
from limbeck.losses.head.closed_form import closed_form
from limbeck.losses.head.fused import Segment, head_and_terms, head_chunk
from limbeck.losses.head.general_form import GeneralForm
from limbeck.losses.head.row_kernel.body import row_kernel
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.positions import Positions
from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import (
    LearningTerm,
    LogitTerm,
    StateTerm,
    SteppedTerm,
    StudentView,
    WeightedTerm,
)


class Objective(nn.Module):
    """Sum over terms j of  weight_j / N  times  the sum over the N scored tokens of term_j.

    N counts the whole optimizer step: all micro-batches on all ranks. It is divided by here and
    nowhere else, so the gradient does not depend on micro-batches or ranks.

    Attributes:
        weights: Weight of each term in the current step.
        needs: What the terms read from the teacher.
        student_layers: Student layers whose block outputs they read, 0-based.
        student_projections: Student layers whose queries, keys and values they read, 0-based.
    """

    def __init__(
        self,
        weighted: Iterable[WeightedTerm],
        head_budget_mb: HeadBudget = "auto",
        positions: Positions | None = None,
    ) -> None:
        """
        Args:
            head_budget_mb: Memory for the logits that exist at once. Changes memory and speed, not
                results.
            positions: Selects the positions of the logit terms; None means all. The mean over the
                selected positions of a micro-batch replaces the mean over all, so a step then
                depends on how it is cut into micro-batches.
        """
        super().__init__()
        weighted = list(weighted)
        self.changing = {name: weight for name, weight, _ in weighted if callable(weight)}
        self.weights = {n: w(0) if callable(w) else w for n, w, _ in weighted}
        self.logit_terms = {n: t for n, _, t in weighted if isinstance(t, LogitTerm)}
        self.state_terms = nn.ModuleDict({n: t for n, _, t in weighted if isinstance(t, StateTerm)})
        self.stepped = [t for _, _, t in weighted if isinstance(t, SteppedTerm)]
        self.learning = {n: t for n, _, t in weighted if isinstance(t, LearningTerm)}
        self.memories = nn.ModuleDict({n: t.memory for n, t in self.learning.items()})
        self.head_budget_mb = head_budget_mb
        self.workspace = Workspace()
        self.positions = positions
        self.needs = SignalNeeds() if positions is None else positions.needs
        self.student_layers: frozenset[int] = frozenset()
        self.student_projections: frozenset[int] = frozenset()
        for _, _, term in weighted:
            self.needs |= term.needs
            if isinstance(term, StateTerm):
                self.student_layers |= term.student_layers
                self.student_projections |= term.student_projections

    def forward(
        self, student: StudentView, signal: TeacherSignal, step_tokens: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """One micro-batch's share of the step's loss, and of each term unweighted.

        Args:
            student: The student's forward pass on this micro-batch.
            step_tokens: N of the whole step.

        Returns:
            The loss to call `backward` on, and each term's share for logging. Summed over the
            step's micro-batches and ranks they are the step's means. With nothing scored the loss
            is zero but has a graph: every rank must run backward, or the others hang in the
            gradient reduction.
        """
        total, shares = self._logit_terms(student, signal)
        everything = slice(None)
        student = replace(student, head_budget_mb=self.head_budget_mb)
        with torch.autocast(student.hidden.device.type, enabled=False):
            for name, term in self.state_terms.items():
                state_sum = student.weigh(term(student, signal), everything).sum()
                total = total + self.weights[name] * state_sum
                shares[name] = state_sum.detach()
        step = step_tokens.clamp_min(1)
        return total / step, {name: shares[name] / step for name in self.weights}

    def try_terms(self, vocabulary: int, position: TeacherDistribution) -> None:
        """Compute every logit term at one position, so that it can refuse a teacher's form.

        Args:
            vocabulary: Size of the student's.
            position: A teacher's distribution there.

        Raises:
            ConfigError: A term is not defined on the form.
        """
        logits, target = torch.zeros(1, vocabulary), torch.zeros(1, dtype=torch.int64)
        for term in self.logit_terms.values():
            term(logits, target, position)

    def set_step(self, step: int) -> None:
        """Set scheduled weights and terms to optimizer step `step`, counted from 0."""
        for name, weight in self.changing.items():
            self.weights[name] = weight(step)
        for term in self.stepped:
            term.set_step(step)

    def update(self, means: Mapping[str, float]) -> None:
        """Update terms that adapt to the run, after an optimizer step that was not skipped.

        Args:
            means: Each term's mean over the scored tokens of the whole step, by name.
        """
        for name, term in self.learning.items():
            term.update(means[name])

    def _logit_terms(
        self, student: StudentView, signal: TeacherSignal
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Weighted sum of all logit terms over the positions, and each term's sum."""
        if not self.logit_terms:
            # Zero, with the same graph as ever: the head gets a gradient of zero.
            return student.hidden[:0].sum() + student.head.weight[:0].sum(), {}
        scale = 1.0
        if self.positions is not None:
            num_positions = len(student.hidden)
            chosen = self.positions.choose(student, signal, self.head_budget_mb)
            scale = num_positions / max(len(chosen), 1)
            student, signal = view_at(student, chosen), signal.select(chosen, num_positions)
        if torch.is_grad_enabled():
            student.head.require_frozen_transform()
        student, parts = self._ordered(student, signal)
        segments, start = [], 0
        for distribution, length in parts:
            rows = slice(start, start + length)
            segments.append(self._segment(view_at(student, rows), distribution, rows))
            start += length
        total, sums = head_and_terms(student.hidden, student.head, segments)
        return total * scale, dict(zip(self.logit_terms, sums * scale, strict=True))

    def _ordered(
        self, student: StudentView, signal: TeacherSignal
    ) -> tuple[StudentView, list[tuple[TeacherDistribution | None, int]]]:
        """The view with its positions sorted by part, and each part's distribution and length.

        Positions in no part come last, where a term reads no distribution; else they are left out.
        """
        num_positions = len(student.hidden)
        if not self.needs.distribution or not signal.parts:
            return student, [(None, num_positions)]
        if signal.parts[0].positions is None:
            return student, [(signal.parts[0].distribution, num_positions)]
        each = [part.positions for part in signal.parts if part.positions is not None]
        parts: list[tuple[TeacherDistribution | None, int]] = [
            (part.distribution, len(positions))
            for part, positions in zip(signal.parts, each, strict=True)
        ]
        if not all(term.needs.distribution for term in self.logit_terms.values()):
            rest = signal.uncovered(num_positions, student.hidden.device)
            each.append(rest)
            parts.append((None, len(rest)))
        return view_at(student, torch.cat(each)), parts

    def _segment(
        self, student: StudentView, distribution: TeacherDistribution | None, rows: slice
    ) -> Segment:
        terms = list(self.logit_terms.values())
        weights = [self.weights[name] for name in self.logit_terms]
        arguments = terms, weights, student, distribution, self.workspace
        body = row_kernel(*arguments) or closed_form(*arguments) or GeneralForm(*arguments)
        weight = student.head.weight
        chunk = head_chunk(self.head_budget_mb, weight, body.copies, body.scratch_bytes)
        return Segment(rows, body, chunk)


def view_at(student: StudentView, rows: Rows) -> StudentView:
    """The same view at some of the positions, for logit terms: no block outputs."""
    weights = student.token_weights
    hidden = student.hidden
    return StudentView(
        hidden[rows] if isinstance(rows, slice) else hidden.index_select(0, rows),
        student.head,
        {},
        student.targets[rows],
        None if weights is None else weights[rows],
    )
