"""The teacher's distribution over the whole vocabulary: logits, or hidden states and a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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
        return LazyLogits(self.hidden.to(device), self.head._replace(weight=weight, bias=bias))

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


def whole_logits(distribution: TeacherDistribution | None, reader: str) -> Float[Tensor, "N V"]:
    """The teacher's logits over the whole vocabulary, without a gradient.

    Args:
        distribution: The teacher's, in any form.
        reader: Name of the term that reads them, for the error message.

    Raises:
        ConfigError: The form does not hold them.
    """
    if isinstance(distribution, LazyLogits):
        return distribution.logits()
    if isinstance(distribution, DenseLogits):
        return distribution.logits.detach()
    raise ConfigError(
        f"The objective's {reader!r} reads the teacher's whole logits, and this teacher is held as "
        f"{type(distribution).__name__}. Use a teacher that is online or whose hidden states were "
        "recorded, or another term."
    )
