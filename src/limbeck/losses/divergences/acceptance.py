"""Acceptance-rate losses for draft models of speculative decoding.

Source: Samarin et al., "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding",
2026, arXiv:2602.23881. Acceptance, the sum over outcomes of min(p, q), is 1 - total variation.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.divergences.base import Outcomes, divergences, gradients
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.divergences.total_variation import total_variation


@divergences.register("lk")
def lk(student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Negative log of the acceptance: minus log of the sum of min(p, q), from 0 up.

    The gradient is total variation's over the acceptance, so it does not vanish for a
    distant student.
    """
    return -torch.minimum(student, teacher).logsumexp(-1)


@divergences.register("lk_kl")
def lk_kl(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    *,
    scale: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    decay: Annotated[float, Ge(0)] = 3.0,
) -> Float[Tensor, " N"]:
    """Weight w times KL(teacher || student), and 1 - w times the rejection 1 - acceptance.

    w = scale exp(-decay acceptance), a constant to the gradient: a token whose distributions are
    far apart is trained by KL, a close one by acceptance. From 0 up; nats and
    probability are added, as published. w uses each token's own acceptance; other public code takes
    one w from the batch's mean acceptance, which gives other values.

    Args:
        scale: Weight of KL where nothing is accepted.
        decay: How fast that weight decays as acceptance grows; 0 keeps it constant.
    """
    rejection = total_variation(student, teacher)
    weight = scale * (-decay * (1 - rejection.detach())).exp()
    return weight * forward_kl(student, teacher) + (1 - weight) * rejection


@gradients.register("lk")
def lk_gradient(outcomes: Outcomes) -> Float[Tensor, " N"]:
    """Value of `lk`; gradient -min(p, q) / acceptance where q < p, half of it where they tie."""
    smaller = torch.minimum(outcomes.student, outcomes.teacher, out=outcomes.spare)
    # sign is 1, 0, -1 where the student is below, at, above the teacher: (1 + sign) / 2 of it.
    is_below = outcomes.teacher.sub_(outcomes.student).sign_()
    total = smaller.logsumexp(-1, keepdim=True)
    share = torch.exp(smaller.sub_(total), out=smaller)
    torch.mul(share, is_below.add_(1), out=outcomes.teacher_prob).mul_(-0.5)
    value: Tensor = -total.squeeze(-1)
    return value


@gradients.register("lk_kl")
def lk_kl_gradient(
    outcomes: Outcomes, *, scale: float = 1.0, decay: float = 3.0
) -> Float[Tensor, " N"]:
    """Value of `lk_kl`; gradient -w p + (1 - w) q sign(q - p) / 2."""
    gap = torch.sub(outcomes.student_prob, outcomes.teacher_prob, out=outcomes.spare)
    ratio = outcomes.teacher.sub_(outcomes.student)
    kl: Tensor = torch.linalg.vecdot(outcomes.teacher_prob, ratio)
    rejection = 0.5 * torch.abs(gap, out=outcomes.teacher).sum(-1)
    weight = scale * (-decay * (1 - rejection)).exp()
    outcomes.teacher_prob.mul_(-weight[:, None])
    pull = gap.sign_().mul_(outcomes.student_prob)
    outcomes.teacher_prob.addcmul_(pull, 0.5 * (1 - weight)[:, None])
    return weight * kl + (1 - weight) * rejection
