"""Gradients sent over the ranks in fewer bytes than they are summed in."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


class NarrowReduceScatter(DefaultReduceScatter):
    """A reduce-scatter that rounds what it sends, and only that.

    FSDP2's own `reduce_dtype` is also the format in which it adds up micro-batches and copies,
    where in bfloat16 small gradients are lost beside large sums. Here those sums stay in float32.

    Bound: with R ranks the error of a sum is at most R 2^-8 times the sum of the magnitudes of
    what the ranks send, to first order: each is rounded once, and so is each partial sum.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work:
        """Sum over the ranks of a group, each of which gets its part."""
        assert not async_op, "FSDP2 waits for it on a stream of its own"
        sums = output_tensor.new_empty(output_tensor.shape, dtype=self._dtype)
        work: dist.Work = super().__call__(sums, input_tensor.to(self._dtype), group, op)
        output_tensor.copy_(sums)
        return work
