"""The contract of a teacher's distribution, whatever form it is held in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import ConfigError

FLOOR = -1e4
"""Least log-probability. Its exponential is exactly 0, yet sums and gradients stay finite, so
divergences need no special case for impossible tokens (padded vocabulary, an empty tail)."""

Rows = slice | Int[Tensor, " n"]
"""Some of the N positions: a stretch of them, or their indices."""


class LogProbPair(NamedTuple):
    """Log-probabilities (natural log) of student and teacher over the same K outcomes.

    Rows sum to one after `exp`; every entry is finite, at least `FLOOR`. The teacher's carry no
    gradient.
    """

    student: Float[Tensor, "N K"]
    teacher: Float[Tensor, "N K"]


class TeacherDistribution(ABC):
    """The teacher's next-token distribution at N scored positions."""

    serves: ClassVar[frozenset[str] | None] = None
    """Names of the divergences defined on this form; None where all are."""

    @abstractmethod
    def rows(self, window: Rows) -> TeacherDistribution:
        """The same distribution at some of the positions."""

    @abstractmethod
    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        """Put both models on the outcomes this distribution can speak about."""

    @abstractmethod
    def entropy(self) -> Float[Tensor, " N"]:
        """The teacher's entropy at each position, nats, over the outcomes it can speak about.

        At temperature 1, or the one a recorded form was read at. A lower bound where outcomes were
        merged.
        """


def require_served(distribution: TeacherDistribution, divergence: str) -> None:
    """Refuse a divergence that is not defined on a form.

    Raises:
        ConfigError: It is not; which are is said.
    """
    serves = distribution.serves
    if serves is not None and divergence not in serves:
        form, known = type(distribution).__name__, ", ".join(sorted(serves))
        raise ConfigError(
            f"A teacher held as {form} serves {known} only, and the objective asks for "
            f"{divergence!r}. Change the divergence, or use a teacher of another form."
        )


def log_softmax(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Log-probabilities at a temperature, in at least float32 whatever the model computes in."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp: Tensor = _Floor.apply(torch.log_softmax(exact / temperature, dim=-1))  # type: ignore[no-untyped-call]
    return logp


class _Floor(torch.autograd.Function):
    """Clamp log-probabilities at `FLOOR` and pass every gradient.

    `clamp_min` drops the gradient of a token the student gives less than e^-10000, which is the one
    that must rise most.
    """

    @staticmethod
    def forward(ctx: Any, logp: Tensor) -> Tensor:
        return logp.clamp_min(FLOOR)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def merge_rest(logp: Float[Tensor, "N V"], kept: Int[Tensor, " S"]) -> Float[Tensor, "N S1"]:
    """Keep some outcomes, in order, and add all the others up into a last one."""
    rest = logp.index_fill(-1, kept, FLOOR).logsumexp(-1, keepdim=True)
    return torch.cat([logp[:, kept], rest], dim=-1)


def entropy_of(logp: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Entropy of each row of log-probabilities, nats."""
    return -(logp.exp() * logp).sum(-1)
