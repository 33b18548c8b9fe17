"""All that a teacher says, and all that it will be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from limbeck.signals.distribution import TeacherDistribution


@dataclass(frozen=True)
class TeacherSignal:
    """All that a teacher says about one batch.

    Attributes:
        distribution: Next-token distribution at the N scored positions, if it was asked for.
        layer_hidden: Block outputs at the N scored positions, by 0-based teacher layer.
    """

    distribution: TeacherDistribution | None = None
    layer_hidden: Mapping[int, Float[Tensor, "N D"]] = field(default_factory=dict)


@dataclass(frozen=True)
class SignalNeeds:
    """What an objective will ask of its teacher; agreed before the first step.

    Attributes:
        distribution: Whether next-token distributions are read.
        layers: 0-based teacher layers whose block outputs are read.
    """

    distribution: bool = False
    layers: frozenset[int] = frozenset()

    def __or__(self, other: SignalNeeds) -> SignalNeeds:
        return SignalNeeds(self.distribution or other.distribution, self.layers | other.layers)
