"""Divergence, cross-entropy or both, with closed-form gradients instead of autograd.

The gradient overwrites the logits, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses.distributions.base import FLOOR, TeacherDistribution
from limbeck.losses.distributions.full import DenseLogits
from limbeck.losses.distributions.merged import MergedOutcomes
from limbeck.losses.distributions.samples import DrawnTokens
from limbeck.losses.distributions.top_k import KeptTokens
from limbeck.losses.distributions.uneven import UnevenTopK
from limbeck.losses.divergences.base import Outcomes
from limbeck.losses.head.blocks import BlockBody
from limbeck.losses.head.fused import ChunkBody, chunks
from limbeck.losses.head.term_pair import TermPair, pair_of
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.terms.base import LogitTerm, StudentView
from limbeck.losses.terms.divergence import DivergenceTerm

WORKING_COPIES = 5
"""Arrays the size of one block of logits that are allocated: those of `Outcomes`."""


def closed_form(
    terms: Sequence[LogitTerm],
    weights: Sequence[float],
    student: StudentView,
    distribution: TeacherDistribution | None,
    workspace: Workspace,
) -> ChunkBody | None:
    """The closed-form body, or None where terms, head or the teacher's form have none."""
    pair = None if student.head.transform is not None else pair_of(terms, weights, distribution)
    return None if pair is None else ClosedForm(pair, weights, student, distribution, workspace)


class ClosedForm(BlockBody):
    """At most one divergence and at most one cross-entropy, with closed-form gradients."""

    def __init__(
        self,
        pair: TermPair,
        weights: Sequence[float],
        student: StudentView,
        distribution: TeacherDistribution | None,
        workspace: Workspace,
    ) -> None:
        """
        Args:
            weights: Weight of each, as they were listed.
            distribution: The teacher's at the N tokens; without one the divergence is 0.
        """
        super().__init__(
            weights,
            student,
            distribution if pair.soft is not None else None,
            workspace,
            block_arrays=WORKING_COPIES,
            chunk_arrays=2 + WORKING_COPIES,
        )
        self.pair = pair
        self.targets, self.token_weights = student.targets, student.token_weights

    def __call__(
        self, products: Float[Tensor, "n V"], window: slice, wants_gradient: bool
    ) -> tuple[Float[Tensor, " terms"], Float[Tensor, "n V"]]:
        """Each term summed over the rows; the gradient of their weighted sum is in `products`."""
        length, vocabulary = products.shape
        size = WORKING_COPIES, min(self.block, length), vocabulary
        work = self.workspace.take("work", size, products, self.exact)
        chunk = self.teacher.at(window)
        targets = self.targets[window, None]
        weights = None if self.token_weights is None else self.token_weights[window, None]
        sums = work.new_zeros(2)
        for few in chunks(length, work.shape[1]):
            teacher = None if chunk is None else chunk.rows(few)
            own = None if weights is None else weights[few].to(sums)
            sums += self._rows(products[few], work, teacher, targets[few], own, wants_gradient)
        return torch.stack([sums[place] for place in self.pair.places]), products

    def _rows(
        self,
        logits: Float[Tensor, "n V"],
        room: Float[Tensor, "copies _ V"],
        teacher: TeacherDistribution | None,
        targets: Int[Tensor, "n 1"],
        weights: Float[Tensor, "n 1"] | None,
        wants_gradient: bool,
    ) -> Float[Tensor, " 2"]:
        """Sums of divergence and cross-entropy over a few rows; the gradient is in `logits`."""
        work = Outcomes(*(each[: len(logits)] for each in room))
        pair, temperature = self.pair, self.pair.temperature
        if logits.dtype == room.dtype and (temperature in {1, 2} or not pair.has_hard):
            # The logits themselves are not read again.
            work = work._replace(student=logits)
        softmax_into(work.student, work.student_prob, logits, temperature)
        hard = -work.student.gather(-1, targets)
        work.student.clamp_min_(FLOOR)
        soft, gradient, prob_weight = hard.new_zeros(1), work.teacher_prob, hard.new_zeros(1)
        if pair.soft is None:
            gradient.zero_()
        else:
            soft, total = self._soft(pair.soft, work, teacher)
            scale = pair.soft_weight * temperature
            gradient.mul_(scale)
            prob_weight = total * -scale
        if pair.has_hard and temperature == 1:
            prob_weight = prob_weight + pair.hard_weight
        gradient.addcmul_(work.student_prob, prob_weight)
        if pair.has_hard and temperature == 2:
            # softmax(z) is softmax(z / 2) squared, over its sum: no further exponential.
            square = torch.mul(work.student_prob, work.student_prob, out=work.spare)
            norm = square.sum(-1, keepdim=True)
            hard = 2 * hard + norm.log()
            gradient.addcmul_(square, pair.hard_weight / norm)
        elif pair.has_hard and temperature != 1:
            softmax_into(work.student, work.spare, logits, 1.0)
            hard = -work.student.gather(-1, targets)
            gradient.add_(work.spare, alpha=pair.hard_weight)
        if wants_gradient:
            gradient.scatter_add_(-1, targets, torch.full_like(hard, -pair.hard_weight))
            logits.copy_(gradient if weights is None else gradient.mul_(weights))
        if weights is not None:
            soft, hard = soft * weights.squeeze(-1), hard * weights
        return torch.stack([soft.sum() * temperature**2, hard.sum()])

    def _soft(
        self, term: DivergenceTerm, work: Outcomes, teacher: TeacherDistribution | None
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 1"]]:
        """Divergence of each row, and the sum of the gradient left in `work.teacher_prob`."""
        assert term.gradient is not None
        if isinstance(teacher, MergedOutcomes):
            return outcomes_gradient(term, work, teacher)
        if isinstance(teacher, UnevenTopK):
            return uneven_gradient(term, work, teacher)
        if isinstance(teacher, KeptTokens):
            return top_k_gradient(term, work, teacher)
        if isinstance(teacher, DrawnTokens):
            return samples_gradient(term, work, teacher)
        assert isinstance(teacher, DenseLogits)
        softmax_into(work.teacher, work.teacher_prob, teacher.logits, term.temperature)
        work.teacher.clamp_min_(FLOOR)
        value = term.gradient(outcomes=work)
        return value, work.teacher_prob.sum(-1, keepdim=True)


def outcomes_gradient(
    term: DivergenceTerm, work: Outcomes, teacher: MergedOutcomes
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 1"]]:
    """The same for outcomes that stand for several tokens of either vocabulary.

    The gradient of an outcome's log-probability is divided among its tokens in proportion to the
    student's probabilities; tokens in no outcome have none.
    """
    of, sums = teacher.outcomes.student, teacher.student_sums(work.student)
    student = torch.log_softmax(sums[:, :-1], -1).clamp_min_(FLOOR)
    prob = student.exp()
    value, gradient = merged_gradient(term, student, teacher.at(term.temperature))
    gradient = torch.nn.functional.pad(gradient - prob * gradient.sum(-1, keepdim=True), (0, 1))
    torch.sub(work.student, sums.index_select(1, of), out=work.teacher_prob).exp_()
    work.teacher_prob.mul_(gradient.index_select(1, of))
    return value, torch.zeros_like(value)[:, None]


def top_k_gradient(
    term: DivergenceTerm, work: Outcomes, teacher: KeptTokens
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 1"]]:
    """The same for a teacher that merged its tail.

    The gradient of the tail's log-probability is divided among its tokens in proportion to the
    student's probabilities.
    """
    student, share = with_tail(work, teacher.ids)
    value, gradient = merged_gradient(term, student, teacher.at(term.temperature))
    torch.mul(share, gradient[:, -1:], out=work.teacher_prob).scatter_(
        -1, teacher.ids, gradient[:, :-1]
    )
    return value, gradient.sum(-1, keepdim=True)


def uneven_gradient(
    term: DivergenceTerm, work: Outcomes, teacher: UnevenTopK
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 1"]]:
    """The same where rows keep different numbers of tokens; tokens not kept are no outcome."""
    student, share = with_tail(work, teacher.ids)
    absent = torch.nn.functional.pad(~teacher.kept, (0, 1))
    student.masked_fill_(absent, FLOOR)
    value, gradient = merged_gradient(term, student, teacher.at(term.temperature))
    gradient.masked_fill_(absent, 0)
    torch.mul(share, gradient[:, -1:], out=work.teacher_prob).scatter_(-1, teacher.ids, 0)
    work.teacher_prob.scatter_add_(-1, teacher.ids, gradient[:, :-1])
    return value, gradient.sum(-1, keepdim=True)


def with_tail(
    work: Outcomes, ids: Int[Tensor, "n k"]
) -> tuple[Float[Tensor, "n k1"], Float[Tensor, "n V"]]:
    """The student on `ids` and the rest, and its distribution within the rest."""
    share = work.spare.copy_(work.student).scatter_(-1, ids, FLOOR)
    tail = share.logsumexp(-1, keepdim=True)
    torch.softmax(share, -1, out=share)
    return torch.cat([work.student.gather(-1, ids), tail], dim=-1), share


def merged_gradient(
    term: DivergenceTerm, student: Float[Tensor, "n k1"], teacher: Float[Tensor, "n k1"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n k1"]]:
    """Divergence of each row over few outcomes, and its gradient."""
    assert term.gradient is not None
    recorded = teacher.to(student)
    merged = Outcomes(student, recorded, student.exp(), recorded.exp(), torch.empty_like(student))
    value = term.gradient(outcomes=merged)
    return value, merged.teacher_prob


def samples_gradient(
    term: DivergenceTerm, work: Outcomes, teacher: DrawnTokens
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 1"]]:
    """The same for tokens sampled from the teacher, whose shares estimate its probabilities."""
    shares = teacher.shares(term.temperature).to(work.student)
    ids = teacher.tokens()
    likelihood: Tensor = torch.linalg.vecdot(shares, work.student.gather(-1, ids))
    work.teacher_prob.zero_().scatter_add_(-1, ids, -shares)
    return -likelihood - teacher.entropy_nats.to(shares), -shares.sum(-1, keepdim=True)


def softmax_into(
    logprobs: Float[Tensor, "n V"],
    probs: Float[Tensor, "n V"],
    logits: Float[Tensor, "n V"],
    temperature: float,
) -> None:
    """Log-probabilities and probabilities at a temperature, with one exponential for both.

    Args:
        logprobs: Written to; exact whatever logits are, and may be the logits themselves.
        probs: Written to.
        logits: Read.
        temperature: What they are divided by.
    """
    source = logprobs
    if logits.dtype != logprobs.dtype:
        logprobs.copy_(logits).div_(temperature)
    elif temperature != 1:
        torch.div(logits, temperature, out=logprobs)
    else:
        source = logits
    torch.softmax(source, -1, out=probs)
    # The largest probability is 1 / sum(exp(z - max z)).
    norm = source.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log_()
    torch.sub(source, norm, out=logprobs)
