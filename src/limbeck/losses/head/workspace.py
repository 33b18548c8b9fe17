"""Buffers reused from one micro-batch to the next."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Large buffers, reused on a CPU, where first-touch page faults cost more than the arithmetic.

    On an accelerator the caching allocator does this.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, size: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer, valid until the same name is taken again.

        Args:
            name: Key under which it is reused.
            size: Its shape.
            like: A tensor on its device.
            dtype: Its dtype.
        """
        if like.device.type != "cpu":
            return like.new_empty(size, dtype=dtype)
        needed = torch.Size(size).numel()
        kept = self._kept.get(name)
        if kept is None or len(kept) < needed or kept.dtype != dtype or kept.is_inference():
            self._kept.pop(name, None)
            self._kept[name] = kept = like.new_empty(needed, dtype=dtype)
        return kept[:needed].view(size)
