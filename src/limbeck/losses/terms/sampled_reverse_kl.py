"""Reverse KL estimated from the token that the student drew at each position."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.head.likelihood import token_logprobs
from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import PairShapes, StateTerm, StudentView, terms


@terms.register("sampled_reverse_kl")
class SampledReverseKlTerm(StateTerm):
    """log q - log p of each written token, nats: an unbiased estimate of KL(q || p).

    q is the student and p the teacher, at temperature 1. The gradient is (log q - log p) times that
    of log q, whose expectation over tokens drawn from q is the gradient of the reverse KL. (The
    derivative of the value itself has the expectation 0.) It holds for text that the student has
    just written at sampling temperature 1, and needs nothing of the teacher but its likelihood of
    that text. Its variance is much larger than that of the divergence `reverse_kl`, which is exact
    at each position: prefer that one where the teacher gives distributions.

    Source: Lu, "On-Policy Distillation", Thinking Machines Lab, 2025 (the reward and its gradient).
    """

    needs = SignalNeeds(likelihoods=True)

    def __init__(self, shapes: PairShapes | None = None) -> None:
        """No options; `shapes` is part of every term's signature."""
        super().__init__()

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        assert signal.likelihoods is not None, "`needs` has likelihoods"
        logprobs = token_logprobs(
            student.hidden, student.head, student.targets, student.head_budget_mb
        )
        own = logprobs.detach()
        gap = own - signal.likelihoods.logprobs.to(own)
        return gap + gap * (logprobs - own)
