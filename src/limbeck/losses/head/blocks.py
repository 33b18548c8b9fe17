"""A chunk a few rows at a time, so that all passes over them find them in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.distributions.base import TeacherDistribution
from limbeck.losses.distributions.full import DenseLogits, LazyLogits
from limbeck.losses.head.fused import multiply
from limbeck.losses.head.workspace import Workspace

BLOCK_BYTES = 3 << 19
"""Rows taken together on a CPU fill at most this much: 8 rows of 49,152 float32 logits."""


def block_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows taken together; on an accelerator all of them."""
    if hidden.device.type != "cpu":
        return max(1, len(hidden))
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return max(1, BLOCK_BYTES // (vocabulary * exact.itemsize))


@dataclass(frozen=True)
class Products:
    """A lazy teacher's products with its head at a chunk.

    Attributes:
        products: `hidden @ weight.T + bias`.
        finish: What its family does to them; to a few rows at a time, as a soft-cap makes copies.
    """

    products: Float[Tensor, "n V"]
    finish: Callable[[Tensor], Tensor]

    def rows(self, few: slice) -> DenseLogits:
        """The distribution at some rows of the chunk."""
        return DenseLogits(self.finish(self.products[few]))


class ChunkTeacher:
    """The teacher's distribution a chunk at a time; a lazy one's products go to one buffer.

    Products of a few rows are slow.
    """

    def __init__(self, distribution: TeacherDistribution | None, workspace: Workspace) -> None:
        """
        Args:
            distribution: The teacher's at all N tokens; None where nobody reads it.
            workspace: Where products go.
        """
        self.distribution = distribution
        self.workspace = workspace

    def at(self, window: slice) -> TeacherDistribution | Products | None:
        """What gives rows of a chunk; good until the next chunk is asked for."""
        if self.distribution is None:
            return None
        chunk = self.distribution.rows(window)
        if not isinstance(chunk, LazyLogits):
            return chunk
        hidden, (weight, bias, finish) = chunk.hidden, chunk.head
        same = torch.promote_types(hidden.dtype, weight.dtype)
        bias = None if bias is None else bias.to(same)
        out = self.workspace.take("teacher", (len(hidden), len(weight)), hidden, same)
        return Products(multiply(hidden.to(same), weight.to(same), bias, out), finish)
