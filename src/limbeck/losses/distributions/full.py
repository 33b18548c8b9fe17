"""The teacher's distribution over the whole vocabulary: logits, or hidden states and a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.batch import sent
from limbeck.errors import ConfigError
from limbeck.losses.distributions.base import (
    LogProbPair,
    TeacherDistribution,
    entropy_of,
    log_softmax,
)
from limbeck.losses.output_head import Head

ENTROPY_ROWS = 256
"""Most positions whose logits exist at once in `entropy`; call it on fewer rows to use less."""


@dataclass(frozen=True)
class DenseLogits(TeacherDistribution):
    """The teacher's logits over the whole vocabulary (K = V)."""

    logits: Float[Tensor, "N V"]

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        return LogProbPair(
            student=log_softmax(student_logits, temperature),
            teacher=log_softmax(self.logits, temperature).detach(),
        )

    def entropy(self) -> Float[Tensor, " N"]:
        parts = torch.split(self.logits.detach(), ENTROPY_ROWS)
        return torch.cat([entropy_of(log_softmax(part, 1.0)) for part in parts])


@dataclass(frozen=True)
class LazyLogits(TeacherDistribution):
    """The teacher's last hidden states and its output head; logits exist only a chunk at a time."""

    hidden: Float[Tensor, "N D"]
    head: Head

    def to(self, device: torch.device) -> LazyLogits:
        weight, bias = self.head.weight.to(device), self.head.bias
        bias = None if bias is None else bias.to(device)
        return LazyLogits(sent(self.hidden, device), self.head._replace(weight=weight, bias=bias))

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        return DenseLogits(self.logits()).compare(student_logits, temperature)

    @torch.no_grad()
    def entropy(self) -> Float[Tensor, " N"]:
        parts = torch.split(self.hidden, ENTROPY_ROWS)
        return torch.cat([entropy_of(log_softmax(self.head(part), 1.0)) for part in parts])

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "N V"]:
        """All logits at once."""
        return self.head(self.hidden)


@dataclass(frozen=True)
class Mixture(TeacherDistribution):
    """The mixture sum_i w_i p_i of whole distributions at temperature 1.

    Another temperature softens the mixture, not its members.

    Attributes:
        members: Distributions over the whole vocabulary, in any form that has logits.
        log_weights: log w_i; the w_i sum to one.
    """

    members: tuple[TeacherDistribution, ...]
    log_weights: tuple[float, ...]

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        return DenseLogits(self.logits()).compare(student_logits, temperature)

    @torch.no_grad()
    def entropy(self) -> Float[Tensor, " N"]:
        return DenseLogits(self.logits()).entropy()

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "N V"]:
        """Log-probabilities of the mixture, all at once."""
        return torch.stack(
            [
                log_softmax(whole_logits(member, "mixture"), 1.0) + log_weight
                for member, log_weight in zip(self.members, self.log_weights, strict=True)
            ]
        ).logsumexp(0)

    @classmethod
    def cat(cls, parts: Sequence[Mixture]) -> Mixture:
        columns = zip(*(part.members for part in parts), strict=True)
        members = tuple(type(column[0]).cat(column) for column in columns)
        return cls(members, parts[0].log_weights)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Mixture:
        return replace(self, members=tuple(each._with_tensors(change) for each in self.members))

    def to(self, device: torch.device) -> Mixture:
        return replace(self, members=tuple(each.to(device) for each in self.members))


def whole_logits(distribution: TeacherDistribution | None, reader: str) -> Float[Tensor, "N V"]:
    """The teacher's logits over the whole vocabulary, without a gradient.

    Args:
        reader: Name of the term that reads them, for the error message.
    """
    if isinstance(distribution, LazyLogits | Mixture):
        return distribution.logits()
    if isinstance(distribution, DenseLogits):
        return distribution.logits.detach()
    raise ConfigError(
        f"The objective's {reader!r} reads the teacher's whole logits, and this teacher is held as "
        f"{type(distribution).__name__}. Use a teacher that is online or whose hidden states were "
        "recorded, or another term."
    )
