"""Divergences between two distributions over the same K outcomes, one family a file.

A divergence is a pure function of two tensors of log-probabilities. It does not reduce over
positions, mask, weight, chunk or apply a temperature: the caller does.

Some also register a closed-form gradient under the same name and options, which the fused head uses
in place of autograd. Tests compare the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.registry import Registry

divergences: Registry[Tensor] = Registry("divergence", package="limbeck.losses.divergences")
ranking: Registry[Tensor] = Registry("divergence", package="limbeck.losses.divergences")
"""Divergences whose value depends on the order of the outcomes' probabilities. Each is registered
here too, and is refused where one outcome stands for several tokens."""

gradients: Registry[Tensor] = Registry("gradient", package="limbeck.losses.divergences")


class Outcomes(NamedTuple):
    """Two distributions over K outcomes, and a buffer: the argument of a closed-form gradient.

    A closed-form gradient returns the divergence of each token and writes its derivative with
    respect to the student's log-probabilities to `teacher_prob`, up to a multiple of
    `student_prob`, which cancels: with respect to logits the gradient is
    `d - student_prob * d.sum()`. It may overwrite everything but `student_prob`.

    Attributes:
        student: Log-probabilities of the student.
        teacher: Log-probabilities of the teacher.
        student_prob: Probabilities of the student.
        teacher_prob: Probabilities of the teacher.
        spare: Uninitialised buffer.
    """

    student: Float[Tensor, "N K"]
    teacher: Float[Tensor, "N K"]
    student_prob: Float[Tensor, "N K"]
    teacher_prob: Float[Tensor, "N K"]
    spare: Float[Tensor, "N K"]


def expectation(logp: Float[Tensor, "N K"], value: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Mean of `value` under the distribution `logp`."""
    return (logp.exp() * value).sum(-1)


def log_mixture(outcomes: Outcomes, share: float) -> Float[Tensor, "N K"]:
    """Log of `share` times the teacher plus the rest of the student, written to `spare`."""
    smallest = torch.finfo(outcomes.spare.dtype).tiny
    mixture = torch.mul(outcomes.student_prob, 1 - share, out=outcomes.spare)
    return mixture.add_(outcomes.teacher_prob, alpha=share).clamp_min_(smallest).log_()
