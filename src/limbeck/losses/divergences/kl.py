"""The two Kullback-Leibler divergences.

Source: Kullback & Leibler, "On Information and Sufficiency", 1951. Names as in knowledge
distillation: *forward* takes the mean under the teacher, *reverse* under the student.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.divergences.base import Outcomes, divergences, expectation, gradients


@divergences.register("forward_kl")
def forward_kl(student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """KL(teacher || student), nats, from 0 up. Covers the teacher's modes.

    The sum over outcomes of p (log p - log q), p the teacher's and q the student's. Source: Hinton
    et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """
    return expectation(teacher, teacher - student)


@divergences.register("reverse_kl")
def reverse_kl(student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """KL(student || teacher), nats, from 0 up. Seeks one of the teacher's modes.

    The sum over outcomes of q (log q - log p). Source: Gu et al., "MiniLLM", 2023,
    arXiv:2306.08543.
    """
    return expectation(student, student - teacher)


@gradients.register("forward_kl")
def forward_kl_gradient(outcomes: Outcomes) -> Float[Tensor, " N"]:
    """Value of `forward_kl`; gradient -p."""
    gap = outcomes.teacher.sub_(outcomes.student)
    value: Tensor = torch.linalg.vecdot(outcomes.teacher_prob, gap)
    outcomes.teacher_prob.neg_()
    return value


@gradients.register("reverse_kl")
def reverse_kl_gradient(outcomes: Outcomes) -> Float[Tensor, " N"]:
    """Value of `reverse_kl`; gradient q log(q / p)."""
    gap = outcomes.student.sub_(outcomes.teacher)
    value: Tensor = torch.linalg.vecdot(outcomes.student_prob, gap)
    torch.mul(outcomes.student_prob, gap, out=outcomes.teacher_prob)
    return value
