"""Models spread over ranks with FSDP2, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from limbeck.distributed.ranks import World


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    *,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Spread a module over all ranks, each block on its own and the rest with the root.

    The same call serves the Distiller and a frozen teacher. The root keeps what belongs to no block
    (embedding, final norm, output head, projectors) gathered after its forward pass: a teacher's
    head is read when its signal is compared, which is later, and a head gathered at every chunk
    would cost a collective a chunk. That is memory for one embedding and one head, not for a model.

    Args:
        module: What is called: FSDP2 gathers weights when the forward pass of *this* module begins.
        blocks: Its decoder blocks.
        world: The ranks; without a mesh nothing happens.
        compute_dtype: Type of the gathered weights and of the computation; gradients are summed in
            float32. None computes in the weights' own.
    """
    if world.mesh is None:
        return
    reduce_dtype = torch.float32 if compute_dtype in (torch.bfloat16, torch.float16) else None
    # Inputs stay as they are: a teacher's log-probabilities and token weights must reach the loss
    # in float32, and hidden states already have the compute data type.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context in which parts of a sharded module may be called by themselves.

    Evaluation runs `distiller.student`, and generation its decoder: neither begins with the root's
    forward pass. Every rank must then make the same calls, because blocks still gather their own.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    # The first forward pass decides who is the root; were it a block's, training would fail later.
    fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def discard_backward(module: nn.Module) -> None:
    """Drop gradients and gathered weights after a failed backward pass.

    The sharded weights are intact and may be saved. The module cannot be trained further: FSDP2
    keeps its blocks in the state of the failed pass, and later gradients would be lost.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()
    module.zero_grad(set_to_none=True)


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is spread over the ranks."""
    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered; every rank calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Every weight whole and on the CPU, on rank 0; nothing on the others, which must call it too.

    One tensor is gathered at a time, so no card ever holds the model.
    """
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        tensor = whole(value)
        if world.is_main:
            weights[name] = tensor.detach().to("cpu", copy=True)
    return weights
