"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Proof:
    """A statement that was checked on the loaded weights.

    Attributes:
        name: The statement, short.
        holds: Whether it is true.
        found: The measured value, and the allowed one.
        meaning: What it implies if it holds, or what to do if it does not.
        decides: Whether a failure prevents a run; otherwise it is a warning.
    """

    name: str
    holds: bool
    found: str
    meaning: str
    decides: bool = True

    @property
    def fails(self) -> bool:
        """Whether it prevents a run from starting."""
        return self.decides and not self.holds


@dataclass(frozen=True)
class Unproven:
    """A statement that could not be checked here."""

    name: str
    why: str


Finding = Proof | Unproven
"""The result of a check."""


def distance(value: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors of one shape, relative to the largest entry of `wanted`."""
    wanted = wanted.double() if wanted.device.type != "mps" else wanted
    gap = (value.to(wanted) - wanted).abs().max()
    return float(gap / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
