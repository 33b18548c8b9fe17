"""What a proof says: what holds, with which number, and what that means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Proof:
    """A statement that was tried on the loaded weights.

    Attributes:
        name: The statement, short.
        holds: Whether it is true.
        found: The number it was judged by, and what was allowed.
        meaning: What follows when it holds, or what to do when it does not.
        decides: Whether a run must not start when it does not hold; otherwise it is a warning.
    """

    name: str
    holds: bool
    found: str
    meaning: str
    decides: bool = True

    @property
    def fails(self) -> bool:
        """Whether it keeps a run from starting."""
        return self.decides and not self.holds


@dataclass(frozen=True)
class Unproven:
    """A statement that could not be tried here.

    Attributes:
        name: The statement, short.
        why: What stood in the way.
    """

    name: str
    why: str


Finding = Proof | Unproven
"""What trying a statement comes to."""


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors of one shape, relative to the largest entry of `wanted`."""
    wanted = wanted.double() if wanted.device.type != "mps" else wanted
    gap = (found.to(wanted) - wanted).abs().max()
    return float(gap / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
