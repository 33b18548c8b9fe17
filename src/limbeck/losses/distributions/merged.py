"""A teacher and a student with other vocabularies, compared on the outcomes that both have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.batch import sent
from limbeck.losses.distributions.base import (
    FLOOR,
    LogProbPair,
    TeacherDistribution,
    entropy_of,
    floored,
    log_softmax,
)
from limbeck.losses.distributions.full import whole_logits


class OutcomeMap(NamedTuple):
    """Outcome of every token of two vocabularies.

    Attributes:
        student: Of each student id, from 0 to K; K is for ids that the teacher cannot spell.
        teacher: Of each teacher id; K is for ids that the student cannot spell.
        num_outcomes: K.
    """

    student: Int[Tensor, " V"]
    teacher: Int[Tensor, " W"]
    num_outcomes: int

    def to(self, device: torch.device) -> OutcomeMap:
        """The same map on a device."""
        return OutcomeMap(sent(self.student, device), sent(self.teacher, device), self.num_outcomes)


@dataclass(frozen=True)
class MergedOutcomes(TeacherDistribution):
    """The teacher's distribution over outcomes, each of which stands for tokens of both sides.

    With P_c and Q_c the summed probabilities of an outcome c under teacher and student, the
    derivative of KL(P || Q) with respect to the student's logit j of outcome c is
    q_j (1 - P_c / Q_c): within an outcome the student keeps its own shares. Ids in no outcome are
    left out of both distributions, as a head is cut to the ids that two models share; they have no
    gradient. An f-divergence is a lower bound of the one on finer outcomes (data-processing
    inequality), and exact where every token is an outcome of its own.

    Attributes:
        member: The teacher's distribution over its own vocabulary, in a form that has logits.
        outcomes: The same at all positions.
    """

    merges_outcomes = True
    covers_all_positions = False

    member: TeacherDistribution
    outcomes: OutcomeMap

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        sums = self.student_sums(log_softmax(student_logits, temperature))
        return LogProbPair(log_softmax(sums[:, :-1], 1.0), self.at(temperature))

    def student_sums(self, logp: Float[Tensor, "N V"]) -> Float[Tensor, "N K1"]:
        """The student's log-probabilities of the outcomes, and of all ids that are in none."""
        return summed(logp, self.outcomes.student, self.outcomes.num_outcomes)

    @torch.no_grad()
    def at(self, temperature: float) -> Float[Tensor, "N K"]:
        """The teacher's log-probabilities of the outcomes, its own softmax softened."""
        logp = log_softmax(whole_logits(self.member, "divergence"), temperature)
        sums = summed(logp, self.outcomes.teacher, self.outcomes.num_outcomes)
        return log_softmax(sums[:, :-1], 1.0)

    @torch.no_grad()
    def entropy(self) -> Float[Tensor, " N"]:
        """Entropy over the outcomes, at temperature 1."""
        return entropy_of(self.at(1.0))

    @classmethod
    def cat(cls, parts: Sequence[MergedOutcomes]) -> MergedOutcomes:
        members = [part.member for part in parts]
        return cls(type(members[0]).cat(members), parts[0].outcomes)

    def to(self, device: torch.device) -> MergedOutcomes:
        return MergedOutcomes(self.member.to(device), self.outcomes.to(device))

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> MergedOutcomes:
        return replace(self, member=self.member._with_tensors(change))


def summed(
    logp: Float[Tensor, "N V"], outcome_of: Int[Tensor, " V"], num_outcomes: int
) -> Float[Tensor, "N K1"]:
    """Log of the summed probabilities of each outcome, and of the ids in none.

    `FLOOR` where there is no id. Each sum is taken relative to its largest term, so that no outcome
    underflows.
    """
    largest = logp.new_full((len(logp), num_outcomes + 1), FLOOR)
    largest.scatter_reduce_(1, outcome_of.expand(len(logp), -1), logp.detach(), "amax")
    shares = (logp - largest.index_select(1, outcome_of)).exp()
    sums = torch.zeros_like(largest).index_add(1, outcome_of, shares)
    return floored(sums.log() + largest)
