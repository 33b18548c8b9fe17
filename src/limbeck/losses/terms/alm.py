"""Approximate likelihood matching: likelihoods of chunks of text instead of distributions.

Source: Minixhofer et al., "Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2025,
arXiv:2503.20083.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses.distributions.top_k import log_one_minus_exp
from limbeck.losses.head.likelihood import token_logprobs
from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import PairShapes, StateTerm, StudentView, terms

CERTAIN = -1e-6
"""Log-likelihoods are kept below this: float32 knows no likelihood closer to 1."""


@terms.register("alm")
class AlmTerm(StateTerm):
    """Binary KL between the two likelihoods of each chunk of the text, nats, from 0 up.

    A chunk is a shortest stretch of bytes that is whole tokens on both sides. With a and b the
    log-likelihoods of a chunk under teacher and student, P = exp(a / tau) and Q = exp(b / tau), its
    loss is tau KL((P, 1 - P) || (Q, 1 - Q)), and its derivative by b is (Q - P) / (1 - Q). The
    authors' code has the cross-entropy in place of the KL, which has the same gradient, and no
    factor tau. In the limit of a large tau the loss is a - b + a log(b / a), and its derivative
    a / b - 1. A chunk's loss is divided evenly among its tokens; a token in no chunk has 0.

    The loss depends on the teacher's likelihood of the text alone: it carries no dark knowledge.
    Under a teacher with the student's tokenizer every token is a chunk.
    """

    needs = SignalNeeds(likelihoods=True)

    def __init__(
        self,
        shapes: PairShapes | None = None,
        *,
        tau: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        """
        Args:
            tau: Divides log-likelihoods; null is the limit of a large one.
        """
        super().__init__()
        self.tau = math.inf if tau is None else tau

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        assert signal.likelihoods is not None, "`needs` has likelihoods"
        chunk_of, teacher = signal.likelihoods
        logprobs = token_logprobs(
            student.hidden, student.head, student.targets, student.head_budget_mb
        )
        own = chunk_sums(logprobs, chunk_of, len(teacher))
        value = binary_kl(teacher.to(own), own, self.tau)
        sizes = chunk_sums(torch.ones_like(logprobs), chunk_of, len(teacher))
        shares = torch.nn.functional.pad(value / sizes.clamp_min(1), (0, 1))
        return shares.index_select(0, chunk_of)


def chunk_sums(
    values: Float[Tensor, " N"], chunk_of: Int[Tensor, " N"], num_chunks: int
) -> Float[Tensor, " C"]:
    """Sum over each chunk's tokens; a token of chunk C is in none."""
    return values.new_zeros(num_chunks + 1).index_add(0, chunk_of, values)[:num_chunks]


def binary_kl(
    teacher: Float[Tensor, " C"], student: Float[Tensor, " C"], tau: float
) -> Float[Tensor, " C"]:
    """Tau times the KL of two Bernoullis, from log-likelihoods; its gradient loses no digits."""
    with torch.no_grad():
        a, b = teacher.clamp_max(CERTAIN), student.clamp_max(CERTAIN)
        value, gradient = limit(a, b) if math.isinf(tau) else softened(a, b, tau)
    return value + gradient * (student - student.detach())


def limit(
    a: Float[Tensor, " C"], b: Float[Tensor, " C"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Value and derivative by b in the limit of a large tau."""
    return a - b + a * (b / a).log(), (a - b) / b


def softened(
    a: Float[Tensor, " C"], b: Float[Tensor, " C"], tau: float
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Value and derivative by b; the derivative is 0 where a equals b."""
    x, y = a / tau, b / tau
    log_rest_x, log_rest_y = log_one_minus_exp(x), log_one_minus_exp(y)
    value = x.exp() * (x - y) - torch.expm1(x) * (log_rest_x - log_rest_y)
    # Not exp(y) expm1(x - y): 0 times infinity where the student is far below.
    gap = torch.maximum(x, y).exp() * torch.expm1(-(x - y).abs()) * (y - x).sign()
    return tau * value, gap / torch.expm1(y)
