"""Buffers reused from one micro-batch to the next."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_MULTIPLE = 16
"""Padded rows start at a multiple of this many elements, which is at least 32 bytes."""


def padded_to(columns: int) -> int:
    """Elements of a padded row."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


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
        """
        if like.device.type != "cpu":
            return like.new_empty(size, dtype=dtype)
        needed = torch.Size(size).numel()
        kept = self._kept.get(name)
        if kept is None or len(kept) < needed or kept.dtype != dtype or kept.is_inference():
            self._kept.pop(name, None)
            self._kept[name] = kept = like.new_empty(needed, dtype=dtype)
        return kept[:needed].view(size)

    def take_rows(
        self, name: str, size: tuple[int, int], like: Tensor, dtype: torch.dtype, *, padded: bool
    ) -> Tensor:
        """A buffer of logits, whose rows may be padded.

        Accelerators read and write 16 bytes at once, if rows start where such an access does; of
        an odd vocabulary no other row would.

        Args:
            name: Key under which it is reused.
            padded: Whether rows start at a multiple of `ROW_MULTIPLE` elements.
        """
        count, columns = size
        pitch = padded_to(columns) if padded else columns
        return self.take(name, (count, pitch), like, dtype)[:, :columns]
