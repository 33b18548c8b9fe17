"""Selection of the scored positions that logit terms are computed at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.config import HeadBudget
from limbeck.losses.distributions.base import entropy_of, log_softmax
from limbeck.losses.head.fused import chunks, head_chunk
from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import StudentView
from limbeck.registry import Registry

Share = Annotated[float, Interval(gt=0, le=1)]


class Positions(ABC):
    """Selects positions of a micro-batch."""

    needs = SignalNeeds()
    """What `choose` reads from the teacher."""

    @abstractmethod
    def choose(
        self, student: StudentView, signal: TeacherSignal, head_budget_mb: HeadBudget
    ) -> Int[Tensor, " n"]:
        """Indices of the selected positions, increasing.

        Args:
            head_budget_mb: Memory for the logits that exist at once.
        """


positions: Registry[Positions] = Registry("choice of positions", package="limbeck.losses")
"""Components take options only."""


class LargestShare(Positions):
    """The positions with the largest value of something."""

    def __init__(self, *, share: Share = 0.2) -> None:
        """
        Args:
            share: Of the positions of each micro-batch, rounded up.
        """
        self.share = share


@positions.register("teacher_entropy")
class TeacherEntropy(LargestShare):
    """The share of positions with the highest teacher entropy.

    The student's head is computed at the chosen positions only. Recorded distributions need
    no head for it; an online teacher's head is computed at every position. Positions
    without a distribution are chosen last.
    """

    needs = SignalNeeds(distribution=True)

    def choose(
        self, student: StudentView, signal: TeacherSignal, head_budget_mb: HeadBudget
    ) -> Int[Tensor, " n"]:
        most = head_chunk(head_budget_mb, student.head.weight, copies=4)
        size, device = (len(student.hidden),), student.hidden.device
        entropies = torch.full(size, -torch.inf, device=device)
        for part in signal.parts:
            positions = torch.arange(*size, device=device)
            if part.positions is not None:
                positions = part.positions
            for rows in chunks(len(positions), most):
                values = part.distribution.rows(rows).entropy()
                entropies[positions[rows]] = values.to(entropies)
        return top_share(entropies, self.share)


@positions.register("student_entropy")
class StudentEntropy(LargestShare):
    """The share of positions with the highest student entropy.

    The teacher's head and both backward products are computed at the selected positions only; the
    student's head is computed once more at every position.
    """

    @torch.no_grad()
    def choose(
        self, student: StudentView, signal: TeacherSignal, head_budget_mb: HeadBudget
    ) -> Int[Tensor, " n"]:
        rows = head_chunk(head_budget_mb, student.head.weight, copies=4)
        parts = torch.split(student.hidden, rows)
        entropies = [entropy_of(log_softmax(student.head(part), 1.0)) for part in parts]
        return top_share(torch.cat(entropies), self.share)


def top_share(uncertainty: Float[Tensor, " N"], share: float) -> Int[Tensor, " n"]:
    """Indices, increasing, of the largest values: a share of them, rounded up."""
    # The product's rounding error must not add one: 0.07 * 100 > 7.
    count = min(math.ceil(share * len(uncertainty) - 1e-9), len(uncertainty))
    return uncertainty.detach().topk(count).indices.sort().values
