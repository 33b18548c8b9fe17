"""Kullback-Leibler divergences against a mixture, bounded and with calmer gradients.

Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024,
arXiv:2402.03898, section 3.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.divergences.base import (
    Outcomes,
    divergences,
    expectation,
    gradients,
    log_mixture,
)

Skew = Annotated[float, Interval(gt=0, lt=1)]


@divergences.register("skew_forward_kl")
def skew_forward_kl(
    student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"], *, skew: Skew = 0.1
) -> Float[Tensor, " N"]:
    """KL(teacher || skew teacher + (1 - skew) student), nats, from 0 to -log(skew).

    Never more than (1 - skew) times forward KL.

    Args:
        skew: Share of the teacher in the mixture.
    """
    mixture = torch.logaddexp(teacher + math.log(skew), student + math.log1p(-skew))
    return expectation(teacher, teacher - mixture)


@divergences.register("skew_reverse_kl")
def skew_reverse_kl(
    student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"], *, skew: Skew = 0.1
) -> Float[Tensor, " N"]:
    """KL(student || (1 - skew) teacher + skew student), nats, from 0 to -log(skew).

    Args:
        skew: Share of the student in the mixture. Its gradient counts there too.
    """
    mixture = torch.logaddexp(teacher + math.log1p(-skew), student + math.log(skew))
    return expectation(student, student - mixture)


@gradients.register("skew_forward_kl")
def skew_forward_kl_gradient(outcomes: Outcomes, *, skew: float = 0.1) -> Float[Tensor, " N"]:
    """Value of `skew_forward_kl`; gradient -(1 - skew) p q / m."""
    mixture = log_mixture(outcomes, skew)
    gap = outcomes.teacher.sub_(mixture)
    value: Tensor = torch.linalg.vecdot(outcomes.teacher_prob, gap)
    # p / m is exp(gap), at most 1 / skew; the quotient itself would be 0 / 0 where both vanish.
    torch.mul(outcomes.student_prob, gap.exp_(), out=outcomes.teacher_prob).mul_(skew - 1)
    return value


@gradients.register("skew_reverse_kl")
def skew_reverse_kl_gradient(outcomes: Outcomes, *, skew: float = 0.1) -> Float[Tensor, " N"]:
    """Value of `skew_reverse_kl`; gradient q (log(q / m) - skew q / m)."""
    mixture = log_mixture(outcomes, 1 - skew)
    gap = outcomes.student.sub_(mixture)
    value: Tensor = torch.linalg.vecdot(outcomes.student_prob, gap)
    ratio = torch.exp(gap, out=outcomes.teacher)
    gap.sub_(ratio, alpha=skew)
    torch.mul(outcomes.student_prob, gap, out=outcomes.teacher_prob)
    return value
