"""How far apart two distributions over the same K outcomes are, one family a file.

A divergence is a pure function of two tensors of log-probabilities. It does not reduce over
positions, mask, weight, chunk or apply a temperature: its callers do, once, for all of them.

A few also have a *slope*, their derivative written out, under the same name and options; the output
head then needs no autograd. Laws hold the two together.
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

slopes: Registry[Tensor] = Registry("slope", package="limbeck.losses.divergences")


class Outcomes(NamedTuple):
    """Two distributions over K outcomes, and room to work in.

    A slope is a function of it. It returns the divergence of each token and leaves the derivative
    with respect to the student's log-probabilities, up to a multiple of `student_mass`, in
    `teacher_mass`. It may overwrite everything but `student_mass`. The multiple does not matter:
    with respect to logits the gradient is `slope - student_mass * slope.sum()`.

    Attributes:
        student: Log-probabilities of the student.
        teacher: Log-probabilities of the teacher.
        student_mass: Probabilities of the student.
        teacher_mass: Probabilities of the teacher.
        spare: Anything; a place for intermediate results.
    """

    student: Float[Tensor, "N K"]
    teacher: Float[Tensor, "N K"]
    student_mass: Float[Tensor, "N K"]
    teacher_mass: Float[Tensor, "N K"]
    spare: Float[Tensor, "N K"]


def expectation(logp: Float[Tensor, "N K"], value: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Mean of `value` under the distribution `logp`."""
    return (logp.exp() * value).sum(-1)


def log_mixture(outcomes: Outcomes, share: float) -> Float[Tensor, "N K"]:
    """Log of `share` times the teacher plus the rest of the student, written to `spare`."""
    smallest = torch.finfo(outcomes.spare.dtype).tiny
    mixture = torch.mul(outcomes.student_mass, 1 - share, out=outcomes.spare)
    return mixture.add_(outcomes.teacher_mass, alpha=share).clamp_min_(smallest).log_()
