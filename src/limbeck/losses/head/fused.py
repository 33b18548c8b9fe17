"""Output head and logit terms fused, a chunk of tokens at a time, without N x V logits."""

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

MIN_CHUNK = 64
"""Smallest chunk: smaller products are slower."""

MAX_CHUNK, AUTO_CHUNK = 1024, 2048
"""Largest chunk on a CPU, where larger products are not faster; and on an accelerator with the
`auto` budget: a program a row, of which an H200 runs 264 or 396 at once (docs/accelerators.md). A
budget in MB is used as a whole there, since larger chunks accumulate the head's gradient less
often."""

AUTO_ROWS = 480
"""Tokens whose logits fit in the `auto` budget. More speed up a CPU's products little; far fewer
slow them down, and make an accelerator read the head and its gradient more often than it computes.
At 2,048 tokens the logits take 7 % of the memory of whole logits."""

CPU_ARRAYS, ACCELERATOR_ARRAYS = 2, 8
"""Arrays of those logits, in float32; an accelerator works on whole chunks."""


def head_bytes(budget_mb: HeadBudget, vocabulary: int, device: torch.device) -> int:
    """The budget in bytes; `auto` depends on vocabulary and device."""
    if budget_mb == "auto":
        arrays = CPU_ARRAYS if device.type == "cpu" else ACCELERATOR_ARRAYS
        return AUTO_ROWS * arrays * 4 * vocabulary
    return budget_mb << 20


def head_chunk(
    budget_mb: HeadBudget, weight: Float[Tensor, "V _"], copies: int, scratch_bytes: int = 0
) -> int:
    """Tokens whose logits may exist at once.

    Args:
        budget_mb: Limit for all arrays together.
        weight: Of the head; its vocabulary and its device matter.
        copies: Float32 arrays of the size of a chunk's logits.
        scratch_bytes: Further memory, independent of the number of tokens.
    """
    room = head_bytes(budget_mb, len(weight), weight.device) - scratch_bytes
    fits = room // (max(len(weight), 1) * 4 * copies)
    if weight.device.type == "cpu":
        fits = min(fits, MAX_CHUNK)
    elif budget_mb == "auto":
        fits = min(fits, AUTO_CHUNK)
    return max(MIN_CHUNK, fits)


def even_chunk(tokens: int, most: int) -> int:
    """Tokens of each chunk, equal but for the last, at most `most`.

    As few chunks as possible, and no small one at the end, because each reads the whole head.
    """
    return -(-tokens // max(-(-tokens // most), 1))


class ChunkBody(ABC):
    """Computes the terms and their gradient from the logits of one chunk."""

    copies: int
    """Arrays of the size of a chunk's logits that are allocated, for the memory budget."""

    scratch_bytes = 0
    """Further memory, independent of the chunk, for the memory budget."""

    pads_rows = False
    """Whether the rows of the chunk's logits are padded; see `Workspace.take_rows`."""

    weights: Sequence[float]
    """Weight of each term in the sum whose gradient is taken."""

    workspace: Workspace
    """Holds the buffer of the chunk's logits."""

    @abstractmethod
    def __call__(
        self, products: Float[Tensor, "n V"], window: slice, wants_gradient: bool
    ) -> tuple[Float[Tensor, " terms"], Float[Tensor, "n V"]]:
        """Each term summed over a chunk's rows, and the gradient of their weighted sum.

        Args:
            products: `hidden @ weight.T + bias` of the chunk; may be overwritten.
            window: The chunk's place among the N rows.
            wants_gradient: If false, the second value is undefined.
        """


class Segment(NamedTuple):
    """Consecutive rows that one body computes.

    Attributes:
        rows: Where they are among the N.
        chunk_tokens: Rows of a chunk, at most; they are cut evenly.
    """

    rows: slice
    body: ChunkBody
    chunk_tokens: int


def head_and_terms(
    hidden: Float[Tensor, "N D"], head: Head, segments: Sequence[Segment]
) -> tuple[Float[Tensor, ""], Float[Tensor, " terms"]]:
    """Weighted sum of the terms over all N rows, and each term's sum.

    The gradient is computed in the forward pass, chunk by chunk, while the chunk's logits exist:
    three products with the head per row, against four when chunks are recomputed in backward.

    Args:
        hidden: Of all rows.
        head: Maps them to logits; its `transform` is applied by the body.
        segments: At least one; together they hold every row once. All have the same terms.

    Returns:
        The weighted sum, differentiable once in `hidden`, `head.weight` and `head.bias`; and the
        sums, for logging.
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


class Gradients:
    """Gradients of a head's inputs, added up over chunks.

    Attributes:
        hidden, weight, bias: None for one that requires none.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, is_training: bool
    ) -> None:
        inputs = (hidden, weight, bias)
        self._wanted = [is_training and each is not None and each.requires_grad for each in inputs]
        of_hidden, of_weight, of_bias = self._wanted
        self.hidden = torch.empty_like(hidden) if of_hidden else None
        # A sum begins with its first chunk, and without rows there is none.
        is_empty = len(hidden) == 0
        self.weight = torch.zeros_like(weight) if of_weight and is_empty else None
        self.bias = torch.zeros_like(bias) if of_bias and is_empty and bias is not None else None

    def __bool__(self) -> bool:
        return any(self._wanted)

    def add(self, gradient: Tensor, rows: Tensor, weight: Tensor, window: slice) -> None:
        """Add a chunk's gradient with respect to its products to those of the inputs."""
        _, of_weight, of_bias = self._wanted
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[window])
        if of_weight:
            if self.weight is not None:  # the first product is freed before there is a second
                self.weight = self.weight.to(torch.promote_types(rows.dtype, torch.float32))
            self.weight = plus_product(self.weight, gradient.t(), rows)
        if of_bias:
            total = gradient.sum(0, dtype=torch.promote_types(gradient.dtype, torch.float32))
            self.bias = total if self.bias is None else self.bias.add_(total)

    def scaled(self, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor | None]:
        """The three times a scale, in the inputs' format; in place."""
        for total in (self.hidden, self.weight, self.bias):
            yield None if total is None else total.mul_(scale).to(dtype)


def plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, in place; the product itself for a total of None.

    A total is in at least float32. On CUDA products are added in it too, so that there is no second
    array, and no rounding of a chunk's sum. A CPU rounds products to their own format; a single one
    stays in it.
    """
    exact = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == exact:
        return left @ right if total is None else total.addmm_(left, right)
    if left.device.type == "cuda":
        if total is None:
            return torch.mm(left, right, out_dtype=exact)
        return torch.addmm(total, left, right, out_dtype=exact, out=total)
    product = left @ right
    return product if total is None else total.add_(product)


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
        gradients = Gradients(hidden, weight, bias, is_training=is_training)
        wants_gradient = bool(gradients)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = segments[0].body.weights
        sums = hidden.new_zeros(len(weights), dtype=exact)
        for place, body, most in segments:
            length = place.stop - place.start
            size = even_chunk(length, most)
            buffer = body.workspace.take_rows(
                "student", (size, len(weight)), hidden, hidden.dtype, padded=body.pads_rows
            )
            for window in chunks(length, size):
                inside = slice(place.start + window.start, place.start + window.stop)
                rows = hidden[inside]
                products = multiply(rows, weight, bias, buffer[: len(rows)])
                chunk_sums, gradient = body(products, window, wants_gradient)
                sums += chunk_sums
                if wants_gradient:
                    gradients.add(gradient, rows, weight, inside)
        # Not `save_for_backward`: backward takes the only reference and scales in place, so that
        # the head's gradient never exists twice.
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        ctx.mark_non_differentiable(sums)
        return weighted_sum(sums, weights), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "An objective's gradients can be computed once, and this is a second backward "
                "pass. Run the objective forward again instead of retaining its graph."
            )
        return (*gradients.scaled(scale, ctx.dtype), None, None)


def weighted_sum(sums: Float[Tensor, " terms"], weights: Sequence[float]) -> Float[Tensor, ""]:
    """Sum of weight times term; the weights stay on the host."""
    total = sums.new_zeros(())
    for each, weight in zip(sums.unbind(), weights, strict=True):
        total = total + weight * each
    return total


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`rows @ weight.T + bias`, written to `out`."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)
