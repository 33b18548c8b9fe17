"""Generalised Jensen-Shannon divergence.

Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD), 2023, arXiv:2306.13649,
eq. 1.
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


@divergences.register("jensen_shannon")
def jensen_shannon(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    *,
    beta: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
) -> Float[Tensor, " N"]:
    """Beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    Nats; from 0 to the entropy of (beta, 1 - beta), so at most log 2 at beta = 0.5.

    Args:
        beta: Weight of the teacher in the mixture. The ends are excluded because the divergence is
            identically zero there; divided by beta or 1 - beta it tends to forward or reverse KL.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    from_teacher = expectation(teacher, teacher - mixture)
    from_student = expectation(student, student - mixture)
    return beta * from_teacher + (1 - beta) * from_student


@gradients.register("jensen_shannon")
def jensen_shannon_gradient(outcomes: Outcomes, *, beta: float = 0.5) -> Float[Tensor, " N"]:
    """Value of `jensen_shannon`; gradient (1 - beta) q log(q / m)."""
    mixture = log_mixture(outcomes, beta)
    outcomes.teacher.sub_(mixture)
    from_teacher: Tensor = torch.linalg.vecdot(outcomes.teacher_prob, outcomes.teacher)
    gap = outcomes.student.sub_(mixture)
    from_student: Tensor = torch.linalg.vecdot(outcomes.student_prob, gap)
    torch.mul(outcomes.student_prob, gap, out=outcomes.teacher_prob).mul_(1 - beta)
    return beta * from_teacher + (1 - beta) * from_student
