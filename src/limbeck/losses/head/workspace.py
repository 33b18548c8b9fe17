"""Memory that one micro-batch leaves to the next."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Large arrays, kept on a CPU: to touch fresh memory takes longer than the arithmetic in it.

    An accelerator's allocator keeps memory by itself, and better, for all who ask.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, size: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """An array, its contents undefined; good until the same name is taken again.

        Args:
            name: What it is for.
            size: Of the array.
            like: Where it is.
            dtype: Of the array.
        """
        if like.device.type != "cpu":
            return like.new_empty(size, dtype=dtype)
        needed = torch.Size(size).numel()
        kept = self._kept.get(name)
        if kept is None or len(kept) < needed or kept.dtype != dtype or kept.is_inference():
            self._kept.pop(name, None)
            self._kept[name] = kept = like.new_empty(needed, dtype=dtype)
        return kept[:needed].view(size)
