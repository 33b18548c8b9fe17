"""Loss and gradient of a chunk by one Triton kernel, on accelerators."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.distributions.base import FLOOR, TeacherDistribution
from limbeck.losses.distributions.full import DenseLogits
from limbeck.losses.distributions.merged import MergedOutcomes
from limbeck.losses.distributions.samples import DrawnTokens
from limbeck.losses.distributions.top_k import KeptTokens
from limbeck.losses.distributions.uneven import UnevenTopK
from limbeck.losses.head.blocks import ChunkTeacher, Products
from limbeck.losses.head.fused import ChunkBody, product_dtype
from limbeck.losses.head.term_pair import TermPair, pair_of
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.logit_transforms import Elementwise, elementwise
from limbeck.losses.terms.base import LogitTerm, StudentView

DEVICES = frozenset({"cuda"})
"""Types of the devices it is used on. On a CPU Triton can only interpret it, which tests do."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def launcher() -> ModuleType | None:
    """The module that calls the kernels; None without Triton. Its one import."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("limbeck.losses.head.row_kernel.launch")


def row_kernel(
    terms: Sequence[LogitTerm],
    weights: Sequence[float],
    student: StudentView,
    distribution: TeacherDistribution | None,
    workspace: Workspace,
) -> RowKernel | None:
    """The kernel's body, or None where device, terms, head or the teacher's form have none."""
    dtype = product_dtype(student.hidden, student.head.weight)
    if student.hidden.device.type not in DEVICES or dtype not in DTYPES:
        return None
    pair = pair_of(terms, weights, distribution)
    if pair is None or elementwise(student.head.transform) is None:
        return None
    if pair.soft is not None and isinstance(distribution, MergedOutcomes):
        return None  # its outcomes are sums over several tokens
    launch = launcher()
    if launch is None or (pair.soft is not None and pair.soft.name not in launch.ROW_DIVERGENCES):
        return None
    return RowKernel(pair, weights, student, distribution, workspace)


class RowKernel(ChunkBody):
    """At most one divergence and at most one cross-entropy; the gradient overwrites the logits.

    Of the size of a chunk there are the student's logits and the teacher's, in the products' dtype.
    """

    pads_rows = True

    def __init__(
        self,
        pair: TermPair,
        weights: Sequence[float],
        student: StudentView,
        distribution: TeacherDistribution | None,
        workspace: Workspace,
    ) -> None:
        """
        Args:
            weights: Weight of each, as they were listed.
            student: Has targets, weights, and the sizes of the chunks to come.
            distribution: The teacher's at the N tokens; without one the divergence is 0.
        """
        self.pair = pair
        self.weights = weights
        self.workspace = workspace
        transform = elementwise(student.head.transform)
        assert transform is not None
        self.transform = transform
        self.targets = student.targets if pair.has_hard else None
        self.token_weights = student.token_weights
        self.teacher = ChunkTeacher(
            distribution if pair.soft is not None else None, workspace, pads_rows=True
        )
        dtype = product_dtype(student.hidden, student.head.weight)
        self.copies = max(1, 2 * dtype.itemsize // 4)

    def __call__(
        self, products: Float[Tensor, "n V"], window: slice, wants_gradient: bool
    ) -> tuple[Float[Tensor, " terms"], Float[Tensor, "n V"]]:
        """Each term summed over the rows; the gradient of their weighted sum is in `products`."""
        launch = launcher()
        assert launch is not None
        length = len(products)
        values = torch.zeros((2, length), dtype=torch.float32, device=products.device)
        if length == 0 or (self.pair.soft is None and self.targets is None):
            return values.new_zeros(len(self.weights)), products.zero_()
        chunk = self.teacher.at(window)
        weights = None if self.token_weights is None else self.token_weights[window].contiguous()
        soft = self.pair.soft
        task = launch.RowTask(
            logits=products,
            transform=self.transform,
            teacher=self._teacher(launch, chunk, length),
            targets=None if self.targets is None else self.targets[window].contiguous(),
            weights=weights,
            divergence=(
                ("forward_kl", ()) if soft is None else (soft.name, tuple(soft.options.values()))
            ),
            temperature=self.pair.temperature,
            soft_weight=self.pair.soft_weight,
            hard_weight=self.pair.hard_weight,
            gradient=wants_gradient,
        )
        launch.kernel_call(task, values[0], values[1]).run()
        return self._sums(values, chunk, weights), products

    def _sums(
        self, values: Float[Tensor, "2 n"], chunk: Any, weights: Float[Tensor, " n"] | None
    ) -> Float[Tensor, " terms"]:
        """Each term summed over the rows, weighted."""
        if self.pair.soft is None:
            values[0] = 0
        elif isinstance(chunk, DrawnTokens):
            values[0] -= chunk.entropy_nats.to(values)
        if weights is not None:
            values *= weights.to(values)
        sums = values.sum(-1)
        sums[0] *= self.pair.temperature**2
        return torch.stack([sums[place] for place in self.pair.places])

    def _teacher(self, launch: ModuleType, chunk: Any, length: int) -> Any:
        """The teacher as the kernels take it; no outcome but the tail where there is none."""
        if isinstance(chunk, KeptTokens):
            ids = chunk.ids
            if isinstance(chunk, UnevenTopK):
                ids = ids.masked_fill(~chunk.kept, -1)
            logprobs = chunk.at(self.pair.temperature).float()
            return launch.SparseTeacher(ids, logprobs, are_shares=False)
        if isinstance(chunk, DrawnTokens):
            shares = chunk.shares(self.pair.temperature).float()
            ids = chunk.tokens().masked_fill(shares == 0, -1)
            logprobs = torch.nn.functional.pad(shares.log(), (0, 1), value=FLOOR)
            return launch.SparseTeacher(ids, logprobs, are_shares=True)
        if chunk is None:
            assert self.targets is not None
            ids = self.targets.new_full((length, 1), -1)
            nothing = torch.zeros((length, 2), dtype=torch.float32, device=ids.device)
            return launch.SparseTeacher(ids, nothing, are_shares=False)
        return launch.DenseTeacher(*dense_rows_of(chunk))


def dense_rows_of(chunk: DenseLogits | Products) -> tuple[Tensor, Elementwise]:
    """Logits a kernel can read, and the transform it has to apply."""
    plain = Elementwise()
    logits, transform = (
        (chunk.products, elementwise(chunk.transform))
        if isinstance(chunk, Products)
        else (chunk.logits, plain)
    )
    if transform is None:
        # Not a known one: applied before the kernel, to the whole chunk.
        assert isinstance(chunk, Products)
        assert chunk.transform is not None
        logits, transform = chunk.transform(chunk.products), plain
    if logits.dtype not in DTYPES:
        logits = logits.float()
    return (logits if logits.stride(-1) == 1 else logits.contiguous()), transform
