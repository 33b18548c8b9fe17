"""Forward KL split into two parts: target token or not, and the other tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses.distributions.base import FLOOR, TeacherDistribution
from limbeck.losses.distributions.full import DenseLogits, whole_logits
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.signal import SignalNeeds
from limbeck.losses.terms.base import LogitTerm, PairShapes, terms


@terms.register("decoupled")
class DecoupledTerm(LogitTerm):
    """Weighted sum of the KL of "target or not" and the KL of the other tokens, nats, from 0 up.

    With p the teacher, q the student and y the target: TCKD is the KL between (p_y, 1 - p_y) and
    (q_y, 1 - q_y), NCKD the KL between the two distributions over the tokens other than y, each
    renormalised. Forward KL is TCKD + (1 - p_y) NCKD; here the
    weight of the second does not vanish for a confident teacher. Multiplied by the temperature
    squared.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, arXiv:2203.08679, eq. 7;
    equal to the authors' code without its warm-up and added cross-entropy.
    """

    needs = SignalNeeds(distribution=True)

    def __init__(
        self,
        shapes: PairShapes | None = None,
        *,
        target_weight: Annotated[float, Ge(0)] = 1.0,
        rest_weight: Annotated[float, Ge(0)] = 1.0,
        temperature: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        """
        Args:
            target_weight: Weight of TCKD.
            rest_weight: Weight of NCKD.
            temperature: Divides both models' logits.
        """
        self.target_weight = target_weight
        self.rest_weight = rest_weight
        self.temperature = temperature

    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"],
        teacher: TeacherDistribution | None,
    ) -> Float[Tensor, " N"]:
        """Temperature squared times the weighted sum, of each token."""
        whole = DenseLogits(whole_logits(teacher, "decoupled"))
        pair = whole.compare(logits, self.temperature)
        student_hit, student_rest = split(pair.student, targets)
        teacher_hit, teacher_rest = split(pair.teacher, targets)
        target = forward_kl(student_hit, teacher_hit)
        rest = forward_kl(student_rest, teacher_rest)
        return (self.target_weight * target + self.rest_weight * rest) * self.temperature**2


def split(
    logp: Float[Tensor, "N V"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "N 2"], Float[Tensor, "N V"]]:
    """Log-probabilities of target and rest, and of each token given that it is not the target."""
    place = targets[:, None]
    rest = logp.scatter(-1, place, FLOOR)
    total = rest.logsumexp(-1, keepdim=True)
    hit = torch.cat([logp.gather(-1, place), total], dim=-1)
    return hit, (rest - total).scatter(-1, place, FLOOR).clamp_min(FLOOR)
