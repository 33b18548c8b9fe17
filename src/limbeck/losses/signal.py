"""All that a teacher says, and all that it will be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.distributions.base import Rows, TeacherDistribution


class Projections(NamedTuple):
    """What a block's attention makes of its input, before norms and rotation, heads side by side.

    Grouped-query attention has fewer keys and values than queries.
    """

    query: Float[Tensor, "N Q"]
    key: Float[Tensor, "N K"]
    value: Float[Tensor, "N K"]


@dataclass(frozen=True)
class TeacherSignal:
    """All that a teacher says about one batch.

    Attributes:
        distribution: Next-token distribution at the N scored positions, if it was asked for.
        layer_hidden: Block outputs at the N scored positions, by 0-based teacher layer.
        layer_projections: Queries, keys and values there, by 0-based teacher layer.
    """

    distribution: TeacherDistribution | None = None
    layer_hidden: Mapping[int, Float[Tensor, "N D"]] = field(default_factory=dict)
    layer_projections: Mapping[int, Projections] = field(default_factory=dict)

    def rows(self, window: Rows) -> TeacherSignal:
        """The same signal at some of the positions, for logit terms: no projections."""
        return TeacherSignal(
            None if self.distribution is None else self.distribution.rows(window),
            {layer: hidden[window] for layer, hidden in self.layer_hidden.items()},
        )


@dataclass(frozen=True)
class SignalNeeds:
    """What an objective will ask of its teacher; agreed before the first step.

    Attributes:
        distribution: Whether next-token distributions are read.
        layers: 0-based teacher layers whose block outputs are read.
        projections: 0-based teacher layers whose queries, keys and values are read.
    """

    distribution: bool = False
    layers: frozenset[int] = frozenset()
    projections: frozenset[int] = frozenset()

    def __or__(self, other: SignalNeeds) -> SignalNeeds:
        return SignalNeeds(
            self.distribution or other.distribution,
            self.layers | other.layers,
            self.projections | other.projections,
        )
