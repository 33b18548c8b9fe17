"""Logit transforms of known model families: functions of the head's products, element by element.

The fused head computes any `Transform`; these also have a fast path on accelerators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.losses.output_head import Transform


@dataclass(frozen=True)
class Softcap:
    """`cap * tanh(product / cap)`: logits stay between -cap and cap (Gemma 2)."""

    cap: float

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return torch.tanh(product / self.cap) * self.cap


@dataclass(frozen=True)
class Multiplied:
    """`product * factor` (Cohere)."""

    factor: float

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return product * self.factor


@dataclass(frozen=True)
class Divided:
    """`product / divisor` (Granite); a division, as the family does it, for equal rounding."""

    divisor: float

    def __call__(self, product: Tensor) -> Tensor:
        """The logits."""
        return product / self.divisor


PLAIN, SCALED, CAPPED = 0, 1, 2


class Elementwise(NamedTuple):
    """A known transform as numbers.

    Attributes:
        kind: `PLAIN`: the product. `SCALED`: scale * product. `CAPPED`: cap * tanh(scale *
            product).
        scale: Of the product.
        cap: Largest logit.
    """

    kind: int = PLAIN
    scale: float = 1.0
    cap: float = 1.0


def elementwise(transform: Transform | None) -> Elementwise | None:
    """A transform as numbers; None if it is not a known one."""
    if transform is None:
        return Elementwise()
    if isinstance(transform, Softcap):
        return Elementwise(CAPPED, 1 / transform.cap, transform.cap)
    if isinstance(transform, Multiplied):
        return Elementwise(SCALED, transform.factor)
    if isinstance(transform, Divided):
        return Elementwise(SCALED, 1 / transform.divisor)
    return None
