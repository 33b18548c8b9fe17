"""Output head and logit terms in one go, a chunk of tokens at a time, without N x V logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.config import HeadBudget
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.output_head import Head

MIN_CHUNK, MAX_CHUNK = 64, 1024
"""Below, the products lose their speed; above, they gain none."""


AUTO_ROWS = 480
"""Tokens that `auto` makes room for. More make a CPU's products little faster, and at 2,048 tokens
these take 7 per cent of the memory of whole logits; much fewer make them slow, and on an
accelerator reading the head and its gradient then takes longest (counted, not measured)."""

CPU_ARRAYS, ACCELERATOR_ARRAYS = 2, 8
"""Of their logits, in float32; an accelerator works on whole chunks."""


def head_bytes(budget_mb: HeadBudget, vocabulary: int, device: torch.device) -> int:
    """What a budget comes to, for a vocabulary where it is `auto`."""
    if budget_mb == "auto":
        arrays = CPU_ARRAYS if device.type == "cpu" else ACCELERATOR_ARRAYS
        return AUTO_ROWS * arrays * 4 * vocabulary
    return budget_mb << 20


def head_chunk(
    budget_mb: HeadBudget, weight: Float[Tensor, "V _"], copies: int, scratch_bytes: int = 0
) -> int:
    """Tokens whose logits may exist at once.

    Args:
        budget_mb: What must hold it all.
        weight: Of the head; its vocabulary and its device count.
        copies: How many arrays of a chunk's logits there are, in float32.
        scratch_bytes: What there is besides, however many tokens there are.
    """
    room = head_bytes(budget_mb, len(weight), weight.device) - scratch_bytes
    fits = room // (max(len(weight), 1) * 4 * copies)
    return max(MIN_CHUNK, min(fits, MAX_CHUNK))


def even_chunk(tokens: int, most: int) -> int:
    """Tokens of each chunk, where all but the last are alike and none has more than `most`.

    As few chunks as that takes, and no small one at the end: each reads the whole head.
    """
    return -(-tokens // max(-(-tokens // most), 1))


class ChunkBody(ABC):
    """What is done with the logits of a chunk while they exist."""

    copies: int
    """How many arrays of a chunk's logits it works with, for the memory budget."""

    scratch_bytes = 0
    """What it works with besides, for the same."""

    weights: Sequence[float]
    """Weight of each term in the sum whose gradient is taken."""

    workspace: Workspace
    """Where the chunk's logits are."""

    @abstractmethod
    def __call__(
        self, products: Float[Tensor, "n V"], window: slice, wants_gradient: bool
    ) -> tuple[Float[Tensor, " terms"], Float[Tensor, "n V"]]:
        """Each term summed over a chunk's rows, and the gradient of their weighted sum.

        Args:
            products: `hidden @ weight.T + bias` of the chunk; may be overwritten.
            window: The chunk's place among the N rows.
            wants_gradient: Otherwise what is returned in its place means nothing.
        """


class Segment(NamedTuple):
    """Consecutive rows that one body computes.

    Attributes:
        rows: Where they are among the N.
        body: Computes their terms.
        chunk_tokens: Rows of a chunk, at most; they are cut evenly.
    """

    rows: slice
    body: ChunkBody
    chunk_tokens: int


def head_and_terms(
    hidden: Float[Tensor, "N D"], head: Head, segments: Sequence[Segment]
) -> tuple[Float[Tensor, ""], Float[Tensor, " terms"]]:
    """Weighted sum of the terms over all N rows, and each term's sum.

    The gradient is taken in the forward pass, chunk by chunk, while the chunk's logits are still
    there: three products with the head a row, against four when chunks are recomputed in backward.

    Args:
        hidden: Of all rows.
        head: What makes logits of them; its `transform` is applied by the body.
        segments: At least one; together they hold every row once. All have the same terms.

    Returns:
        The weighted sum, differentiable in `hidden`, `head.weight` and `head.bias`, one backward
        pass a forward pass; and the sums, for logging.
    """
    dtype = product_dtype(hidden, head.weight)
    bias = None if head.bias is None else head.bias.to(dtype)
    arguments = hidden.to(dtype), head.weight.to(dtype), bias, segments, torch.is_grad_enabled()
    # Autocast ignores products written to a buffer and would cast some of the reductions.
    with torch.autocast(hidden.device.type, enabled=False):
        weighted, sums = _HeadAndTerms.apply(*arguments)  # type: ignore[no-untyped-call]
    return weighted, sums


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of a product with a head: autocast's inside autocast, else the wider of the two."""
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if wider != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return wider


class Gradients(NamedTuple):
    """Gradients that grow chunk by chunk; None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def wanted(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        """Empty gradients of what is to be trained.

        Those of weight and bias are sums over chunks, so they are kept in at least float32.
        """
        exact = torch.promote_types(weight.dtype, torch.float32)
        return cls(
            torch.empty_like(hidden) if hidden.requires_grad else None,
            torch.zeros_like(weight, dtype=exact) if weight.requires_grad else None,
            torch.zeros_like(bias, dtype=exact)
            if bias is not None and bias.requires_grad
            else None,
        )

    def add(self, gradient: Tensor, rows: Tensor, weight: Tensor, window: slice) -> None:
        """Carry a chunk's gradient with respect to its products on to what they were made of."""
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[window])
        if self.weight is not None and self.weight.dtype == rows.dtype:
            self.weight.addmm_(gradient.t(), rows)
        elif self.weight is not None:
            self.weight.add_(gradient.t() @ rows)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))


def chunks(length: int, size: int) -> Iterator[slice]:
    """Consecutive windows of at most `size` rows."""
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + size, length))


class _HeadAndTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        segments: Sequence[Segment],
        is_training: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias)
        gradients = Gradients.wanted(*inputs) if is_training else Gradients(None, None, None)
        wants_gradient = any(gradient is not None for gradient in gradients)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = segments[0].body.weights
        sums = hidden.new_zeros(len(weights), dtype=exact)
        for place, body, most in segments:
            length = place.stop - place.start
            size = even_chunk(length, most)
            buffer = body.workspace.take("student", (size, len(weight)), hidden, hidden.dtype)
            for window in chunks(length, size):
                inside = slice(place.start + window.start, place.start + window.stop)
                rows = hidden[inside]
                products = multiply(rows, weight, bias, buffer[: len(rows)])
                chunk_sums, gradient = body(products, window, wants_gradient)
                sums += chunk_sums
                if wants_gradient:
                    gradients.add(gradient, rows, weight, inside)
        # Not `save_for_backward`: backward takes the only reference, scales in place and hands it
        # on, so that the head's gradient never exists twice.
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        ctx.mark_non_differentiable(sums)
        return weighted_sum(sums, weights), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "An objective's gradients can be taken once, and a second backward pass asked for "
                "them. Run the objective forward again instead of retaining its graph."
            )
        scaled = (None if g is None else g.mul_(scale).to(ctx.dtype) for g in gradients)
        return (*scaled, None, None)


def weighted_sum(sums: Float[Tensor, " terms"], weights: Sequence[float]) -> Float[Tensor, ""]:
    """Sum of weight times term, the weights staying on the host."""
    total = sums.new_zeros(())
    for each, weight in zip(sums.unbind(), weights, strict=True):
        total = total + weight * each
    return total


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`rows @ weight.T + bias`, written to `out`."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)
