"""Blocks: a few rows of a chunk at a time, so that all passes over them hit the CPU's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.distributions.base import TeacherDistribution
from limbeck.losses.distributions.full import DenseLogits, LazyLogits
from limbeck.losses.distributions.merged import MergedOutcomes, OutcomeMap
from limbeck.losses.head.fused import ChunkBody, multiply, product_dtype
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.output_head import Transform
from limbeck.losses.terms.base import StudentView

BLOCK_BYTES = 3 << 19
"""Largest block on a CPU: 8 rows of 49,152 float32 logits."""


def block_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows of a block; on an accelerator all of them."""
    if hidden.device.type != "cpu":
        return max(1, len(hidden))
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return max(1, BLOCK_BYTES // (vocabulary * exact.itemsize))


@dataclass(frozen=True)
class Products:
    """A lazy teacher's products with its head at a chunk.

    Attributes:
        products: `hidden @ weight.T + bias`.
        transform: The head's, applied to a few rows at a time because it allocates.
        outcomes: Of a teacher with another vocabulary.
    """

    products: Float[Tensor, "n W"]
    transform: Transform | None
    outcomes: OutcomeMap | None = None

    def rows(self, few: slice) -> TeacherDistribution:
        """The distribution at some rows of the chunk."""
        products = self.products[few]
        own = DenseLogits(products if self.transform is None else self.transform(products))
        return own if self.outcomes is None else MergedOutcomes(own, self.outcomes)


class ChunkTeacher:
    """The teacher's distribution a chunk at a time; a lazy one's products go to one buffer.

    Products are made of a whole chunk because those of a few rows are slow.
    """

    def __init__(
        self, distribution: TeacherDistribution | None, workspace: Workspace, *, pads_rows: bool
    ) -> None:
        """
        Args:
            distribution: The teacher's at all N tokens; None where no term reads it.
            workspace: Holds the buffer of the products.
            pads_rows: Whether its rows are padded.
        """
        self.workspace = workspace
        self.pads_rows = pads_rows
        self.outcomes: OutcomeMap | None = None
        if isinstance(distribution, MergedOutcomes) and isinstance(distribution.member, LazyLogits):
            self.outcomes = distribution.outcomes
            distribution = distribution.member
        if isinstance(distribution, LazyLogits):
            # Once for all chunks: a head in another dtype than the states is copied as a whole.
            dtype = product_dtype(distribution.hidden, distribution.head.weight)
            head = distribution.head.to(dtype)
            distribution = LazyLogits(distribution.hidden.to(dtype), head)
        self.distribution = distribution

    def at(self, window: slice) -> TeacherDistribution | Products | None:
        """An object whose `rows` gives rows of a chunk; valid until the next call."""
        if self.distribution is None:
            return None
        chunk = self.distribution.rows(window)
        if not isinstance(chunk, LazyLogits):
            return chunk
        hidden, (weight, bias, transform) = chunk.hidden, chunk.head
        size = len(hidden), len(weight)
        out = self.workspace.take_rows("teacher", size, hidden, hidden.dtype, padded=self.pads_rows)
        return Products(multiply(hidden, weight, bias, out), transform, self.outcomes)


class BlockBody(ChunkBody):
    """Terms and gradient a block of rows at a time; an accelerator's block is the whole chunk."""

    def __init__(
        self,
        weights: Sequence[float],
        student: StudentView,
        distribution: TeacherDistribution | None,
        workspace: Workspace,
        *,
        block_arrays: int,
        chunk_arrays: int,
    ) -> None:
        """
        Args:
            weights: Weight of each term.
            student: Has targets, weights, and the sizes of the chunks to come.
            distribution: The teacher's at the N tokens; None where no term reads it.
            block_arrays: Arrays of the size of a block that are allocated, beside those of a chunk.
            chunk_arrays: Arrays of the size of a chunk that are allocated on an accelerator.
        """
        self.weights, self.workspace = weights, workspace
        vocabulary, hidden = len(student.head.weight), student.hidden
        in_blocks = hidden.device.type == "cpu"
        self.pads_rows = not in_blocks
        self.teacher = ChunkTeacher(distribution, workspace, pads_rows=self.pads_rows)
        self.exact = torch.promote_types(hidden.dtype, torch.float32)
        self.block = block_rows(hidden, vocabulary)
        self.copies = 2 if in_blocks else chunk_arrays
        if in_blocks:
            self.scratch_bytes = block_arrays * self.block * vocabulary * self.exact.itemsize
