"""Base class of the forms of a teacher's next-token distribution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.batch import sent
from limbeck.errors import ConfigError
from limbeck.losses.divergences.base import divergences, ranking

FLOOR = -1e4
"""Smallest log-probability. Its exponential is exactly 0, yet sums and gradients stay finite, so
divergences need no special case for impossible tokens (padded vocabulary, an empty tail)."""

Rows = slice | Int[Tensor, " n"]
"""Selects positions: a slice or indices."""


Form = TypeVar("Form", bound="TeacherDistribution")


class LogProbPair(NamedTuple):
    """Log-probabilities (natural log) of student and teacher over the same K outcomes.

    Rows sum to one after `exp`; every entry is finite, at least `FLOOR`. The teacher's carry no
    gradient.
    """

    student: Float[Tensor, "N K"]
    teacher: Float[Tensor, "N K"]


@dataclass(frozen=True)
class TeacherDistribution(ABC):
    """The teacher's next-token distribution at N scored positions.

    A form is a frozen dataclass. Its tensors, and the tensors of its mappings, have a row for each
    position; its other fields are the same at all positions.
    """

    serves: ClassVar[frozenset[str] | None] = None
    """Names of the divergences defined on this form; None for every one."""

    merges_outcomes: ClassVar[bool] = False
    """Whether one outcome stands for several tokens. Its probability then has no rank among those
    of tokens, so divergences that rank outcomes are not defined."""

    covers_all_positions: ClassVar[bool] = True
    """Whether a teacher of this form has one at every scored position. If not, a position without
    one counts 0 in the mean of a divergence, as in the objective."""

    @abstractmethod
    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        """Log-probabilities of both models over the outcomes of this form."""

    @abstractmethod
    def entropy(self) -> Float[Tensor, " N"]:
        """The teacher's entropy at each position over the outcomes of this form, nats.

        At temperature 1, or the one a recorded form was read at. A lower bound where outcomes were
        merged.
        """

    @classmethod
    def names_served(cls) -> list[str]:
        """Names of the divergences defined on this form, sorted."""
        names = set(divergences.names()) if cls.serves is None else set(cls.serves)
        return sorted(names - set(ranking.names()) if cls.merges_outcomes else names)

    def rows(self: Form, window: Rows) -> Form:
        """The same distribution at the selected positions."""
        return self._with_tensors(lambda tensor: tensor[window])

    def to(self: Form, device: torch.device) -> Form:
        """The same distribution on a device; the host does not wait until it is there."""
        return self._with_tensors(lambda tensor: sent(tensor, device))

    @classmethod
    def cat(cls: type[Form], parts: Sequence[Form]) -> Form:
        """Distributions of one form and setting, one after the other; at least one.

        Narrower rows are padded with 0.
        """
        assert all(type(part) is cls for part in parts)
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{name: concatenated(values) for name, values in columns.items()})

    def _with_tensors(self: Form, change: Callable[[Tensor], Tensor]) -> Form:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: changed(value, change) for name, value in values.items()})


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to a tensor or to a mapping's tensors; other values unchanged."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: change(each) for key, each in value.items()}
    return value


def concatenated(values: Sequence[Any]) -> Any:
    """Tensors or mappings of tensors, concatenated along the positions; else the first value."""
    first = values[0]
    if isinstance(first, Mapping):
        return {key: concatenated([each[key] for each in values]) for key in first}
    if not isinstance(first, Tensor):
        return first
    width = max(each.shape[-1] for each in values) if first.ndim > 1 else 0
    return torch.cat([padded(each, width) for each in values])


def padded(values: Tensor, width: int, filler: float | bool = 0) -> Tensor:
    """Rows padded to a width; vectors unchanged."""
    missing = width - values.shape[-1]
    if values.ndim == 1 or missing == 0:
        return values
    return torch.nn.functional.pad(values, (0, missing), value=filler)


def require_served(distribution: TeacherDistribution, divergence: str) -> None:
    """Raise a ConfigError if a divergence or term is not defined on a form."""
    serves = distribution.serves
    is_ranking = distribution.merges_outcomes and divergence in ranking.names()
    if is_ranking or (serves is not None and divergence not in serves):
        form, served = type(distribution).__name__, ", ".join(distribution.names_served())
        raise ConfigError(
            f"A teacher held as {form} supports {served} only, and the objective uses "
            f"{divergence!r}. Change the divergence, or use a teacher of another form."
        )


def log_softmax(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, "N V"]:
    """Log-probabilities at a temperature, in at least float32 whatever the model computes in."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return floored(torch.log_softmax(exact / temperature, dim=-1))


def floored(logp: Tensor) -> Tensor:
    """Log-probabilities of at least `FLOOR`, with every gradient."""
    clamped: Tensor = _Floor.apply(logp)  # type: ignore[no-untyped-call]
    return clamped


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


def entropy_of(logp: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Entropy of each row of log-probabilities, nats."""
    return -(logp.exp() * logp).sum(-1)
