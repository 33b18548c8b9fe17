"""Models sharded over ranks with FSDP2, and gathered again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from limbeck.distributed.casting import NARROW, cast_weights, compute_in
from limbeck.distributed.filling import fill, prove, unfilled
from limbeck.distributed.ranks import World
from limbeck.heap import freed_memory_returned
from limbeck.models import CausalLM


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> None:
    """Shard a module over all ranks: each block, each embedding, and the rest with the root.

    Without a mesh this only sets the format to compute in, which `cast_weights` applies.
    A model that `open_model` left on the meta device is then read from its files, each rank its
    own rows, and its head and packing are proven.

    The root keeps the rest (final norm, output head, projectors, a tied embedding) gathered after
    its forward pass: a teacher's head is read when its signal is compared, which is later, and
    gathering a head for every chunk would cost a collective a chunk. That is memory for one head,
    not for a model. The backward pass shards it again, and for a teacher, which has none, `release`
    does. The gradient of an embedding does not depend on its weight, which stays sharded then.

    Args:
        module: The root: FSDP2 gathers weights when the forward pass of *this* module begins.
        blocks: Its decoder blocks.
        world: The ranks. With `offload` nothing is to be trained.
        compute_dtype: Type of the gathered weights and of the computation; gradients are summed in
            float32. None computes in the weights' own.
        reduce_dtype: Type in which gradients are sent to be summed over the ranks of a shard group.
    """
    waiting = unfilled(module)
    if world.mesh is None:
        assert not waiting, "only a sharded model may leave its weights in their files"
        compute_in(module, compute_dtype)
        return
    summed_in = torch.float32 if compute_dtype in NARROW else None
    # Inputs stay as they are: a teacher's log-probabilities and token weights must reach the loss
    # in float32, and hidden states already have the compute data type.
    policy = MixedPrecisionPolicy(compute_dtype, summed_in, cast_forward_inputs=False)
    pinned = world.device.type == "cuda"
    where = CPUOffloadPolicy(pin_memory=pinned) if world.offload else OffloadPolicy()
    wrap = partial(fully_shard, mesh=world.mesh, mp_policy=policy, offload_policy=where)
    for block in blocks:
        wrap(block)
    for model in module.modules():
        if isinstance(model, CausalLM):
            model.device, model.compute_dtype = world.device, compute_dtype
            for embedding in model.own_embeddings:
                wrap(embedding).set_unshard_in_backward(False)
    wrap(module, reshard_after_forward=False)
    for part in module.modules():
        if isinstance(part, CausalLM):
            write_alone(part)
        if isinstance(part, FSDPModule) and reduce_dtype != torch.float32:
            part.set_custom_reduce_scatter(NarrowReduceScatter(reduce_dtype))
    with freed_memory_returned():
        for model in waiting:
            fill(model, world)
        become_root(module)
        with gathered(module):
            for model in waiting:
                prove(model)


def write_alone(model: CausalLM) -> None:
    """Let `generate` of transformers run on one rank without the others, in `unsharded`.

    With FSDP2's mark it sums over all ranks after each token whether one still writes, and waits
    for ranks that have nothing to write. It alone reads the mark of a model that is not compiled.
    """
    cast(Any, model.hf_model)._is_fsdp_managed_module = False


def become_root(module: nn.Module) -> None:
    """Initialise FSDP2 with a module as its root, by a forward pass that computes nothing.

    The root is the module whose forward pass runs first. Were it a block's, in an evaluation before
    training, training would fail; nor can anything be reset before there is a root.
    """
    assert isinstance(module, FSDPModule)
    register_fsdp_forward_method(module, "extra_repr")
    module.extra_repr()
    del module.extra_repr  # the class's own is in place again
    release(module)


def release(root: nn.Module) -> None:
    """Shard again what is gathered, and forget the passes since the last backward pass.

    FSDP2 lists the units of every forward pass, those without gradients too, and only a backward
    pass clears the list. The next backward pass gathers ahead along it: a rank that made other
    passes would gather another unit. Nor would the list of a teacher ever end.

    Args:
        root: What `shard` was called with. A model in training only between steps, because
            gradients that replicas have not reduced yet are dropped.
    """
    if isinstance(root, FSDPModule):
        root.reset_iter_state()


def gather_root(root: nn.Module) -> None:
    """Gather what a root keeps gathered after its forward pass, unless it is."""
    if isinstance(root, FSDPModule):
        root.unshard()


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """A context in which parts of sharded modules may be called and read by themselves.

    Evaluation runs `distiller.student`, and generation its decoder: neither begins with the root's
    forward pass. Every rank must then make the same calls, because blocks still gather their own.
    The weights of modules that are not sharded are cast.
    """
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(cast_weights(module))
        for root in sharded:
            stack.callback(release, root)
            root.unshard()
        yield


@contextmanager
def unsharded(root: nn.Module) -> Iterator[None]:
    """A context in which every rank holds all weights of a module, blocks included.

    Ranks may then make different numbers of calls, as when texts end after different numbers of
    tokens. It takes memory for the whole module. Weights of one that is not sharded are cast.

    Args:
        root: What `shard` was called with.
    """
    parts = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with cast_weights(root):
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not root, recurse=False)
        release(root)


def abandon_pass(module: nn.Module) -> None:
    """Make a module fit for its next forward pass, after one or its backward pass raised.

    All gradients of the step are dropped, those not yet reduced included, which FSDP2 would else
    add to the next ones. It keeps the state of the failed pass until `reset_iter_state`: without
    that, later gradients land on gathered copies and no optimizer sees them.

    Args:
        module: What was called; the root where it is sharded.
    """
    if isinstance(module, FSDPModule):
        for part in module.modules():
            if isinstance(part, FSDPModule):
                drop_unreduced(part)
        module.reset_iter_state()
    module.zero_grad(set_to_none=True)


def plan_reduction(module: nn.Module, *, once: bool, is_last: bool) -> None:
    """Set whether the next backward pass reduces gradients over the ranks.

    Replicas reduce in a step's last pass only: until then FSDP2 sums this rank's shards. With
    `once` the ranks of a shard group do too, and FSDP2 sums whole gradients. The sums are in
    float32 either way.

    Args:
        module: The root.
        once: Whether to reduce once a step instead of in each pass.
        is_last: Whether the pass is the last of its step; the same on every rank.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last or not once)
        module.set_requires_all_reduce(is_last)


def drop_unreduced(part: FSDPModule) -> None:
    """Drop whole gradients that wait for the last pass of their step.

    `reset_iter_state` keeps them, and no public interface reaches them while weights are sharded.
    """
    for group in part._get_fsdp_state()._fsdp_param_groups:
        for each in group.fsdp_params:
            each.unsharded_accumulated_grad = None
            if "_unsharded_param" in vars(each):  # made when weights are first gathered
                each._unsharded_param.grad = None


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is spread over the ranks."""
    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered; every rank calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
