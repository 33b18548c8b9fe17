"""Bytes, collectives and floating-point operations of a process, counted as they happen.

It counts simulated and real steps alike, which is how the simulation is validated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from limbeck.distributed.sharding import local

KINDS = {
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
}
"""Collectives of c10d, and the argument that has the whole tensors."""

ATEN = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    ATEN.addmm_: flop_counter.flop_registry[ATEN.addmm],
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_counter.flop_registry[
        ATEN._scaled_dot_product_flash_attention
    ],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""Operations with products, and what each costs. Causal attention is counted whole."""


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of collective of a step.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce or broadcast.
        ranks: Of its group.
        stride: Distance of its ranks; 1 for neighbours, the size of a copy between copies.
        count: How often.
        whole_bytes: Of the gathered or not yet reduced tensors, all calls together.
    """

    kind: str
    ranks: int
    stride: int
    count: int
    whole_bytes: int


@dataclass(frozen=True)
class StepFootprint:
    """One optimizer step on one rank.

    Attributes:
        memory_bytes: Of all tensors on the device at the step's peak, by purpose.
        collectives: All of the step.
        flops: Of matrix products and attention, which is counted as if it were not causal.
        host_bytes: Of weights in host memory, all the time.
    """

    memory_bytes: Mapping[str, int]
    collectives: tuple[Collective, ...]
    flops: int
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All tensors at the step's peak."""
        return sum(self.memory_bytes.values())


class Footprint(TorchDispatchMode):
    """What the code inside holds, sends and computes.

    A storage counts from its first appearance in an operation's result until it is freed, by the
    size that it has: FSDP2 empties gathered weights and keeps them.

    Attributes:
        live_bytes: Of all storages there are.
        peak_bytes: The most since `reset`.
        flops: Since `reset`.
        summed: The copy that gloo makes of what it reduces and scatters, while it does.
    """

    def __init__(self, modules: Iterable[nn.Module], device_type: str | None = None) -> None:
        """
        Args:
            modules: Whose weights are there already.
            device_type: Tensors elsewhere are not counted; None counts all.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = self.flops = 0
        self.summed: Tensor | None = None
        self._look_above = math.inf
        self._look: Callable[[], None] = lambda: None
        self._live: dict[int, tuple[int, tuple[int, ...], weakref.ref[Any]]] = {}
        self._collectives: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._device_type = device_type
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._note(local(tensor))

    def reset(self, look_above: float = math.inf, look: Callable[[], None] = lambda: None) -> None:
        """Count anew.

        Args:
            look_above: Whenever more bytes than these are live, and more than ever before, `look`
                is called: last at the peak. An operation's number would not find it: simulated
                steps differ in operations without results, and memory grows between operations.
            look: For example to take `by_purpose`.
        """
        self.peak_bytes, self.flops = self.live_bytes, 0
        self._look_above, self._look = look_above, look
        self._collectives = {}

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Those since `reset`."""
        return tuple(
            Collective(*group, count, size)
            for group, (count, size) in sorted(self._collectives.items())
        )

    def storages(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Key, bytes and first shape of every storage."""
        yield from ((key, size, shape) for key, (size, shape, _) in self._live.items())

    def __enter__(self) -> Footprint:
        plain = self._plain_resize = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = plain(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._plain_resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute, and count."""
        if DTensor in types:
            return NotImplemented  # its local tensors come next
        kwargs = dict(kwargs or {})
        if func is torch.ops.c10d._reduce_scatter_base_.default and args[1].device.type == "cpu":
            # A real copy is made where no mode sees it, and a simulated group makes none.
            self.summed = torch.empty_like(args[1])
            self._note(self.summed)
            self.summed = None
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if func.namespace == "c10d":
            self._count(func, args)
        if cost := FLOPS.get(func.overloadpacket):
            self.flops += cost(*args, **kwargs, out_val=result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.partition("::")[2]
        if name not in KINDS:
            return
        kind, place = KINDS[name]
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        key = (kind, len(ranks), stride)
        size = sum(t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor))
        count, before = self._collectives.get(key, (0, 0))
        self._collectives[key] = (count + 1, before + size)

    def _note(self, tensor: Tensor) -> None:
        if self._device_type not in (None, tensor.device.type):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            self._resized(storage)
            return
        gone = weakref.ref(storage, lambda _: self._drop(key))
        self._live[key] = (size, tuple(tensor.shape), gone)
        self._grow(size)

    def _resized(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            before, shape, gone = self._live[key]
            self._live[key] = (size, shape, gone)
            self._grow(size - before)

    def _drop(self, key: int) -> None:
        if key in self._live:
            self.live_bytes -= self._live.pop(key)[0]

    def _grow(self, size: int) -> None:
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            if self.live_bytes > self._look_above:
                with _disable_current_modes():  # memory may grow outside of operations
                    self._look()


def by_purpose(
    footprint: Footprint,
    models: Mapping[str, nn.Module],
    optimizers: Iterable[Optimizer],
    vocabulary: int,
) -> dict[str, int]:
    """Bytes of all storages by what they are for.

    Args:
        footprint: That counted them.
        models: By name; sharded or not.
        optimizers: Whose state is named.
        vocabulary: A storage with this among its sizes holds logits, or the head's gradient.
    """
    purposes: dict[int, str] = {}

    def tag(tensor: Tensor | None, purpose: str) -> None:
        if tensor is not None:
            purposes.setdefault(local(tensor).untyped_storage()._cdata, purpose)

    tag(footprint.summed, "gradients, not yet reduced")
    for name, model in models.items():
        for part in model.modules():
            if isinstance(part, FSDPModule):
                for tensor, purpose in of_unit(part):
                    tag(tensor, purpose.format(model=name))
        for tensor in (*model.parameters(), *model.buffers()):
            tag(tensor, f"{name} weights")
        for parameter in model.parameters():
            tag(parameter.grad, "gradients")
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                tag(value if isinstance(value, Tensor) else None, "optimizer state")
    sizes: dict[str, int] = {}
    for key, size, shape in footprint.storages():
        fallback = "logits and head gradient" if vocabulary in shape else "activations"
        purpose = purposes.get(key, fallback)
        sizes[purpose] = sizes.get(purpose, 0) + size
    return sizes


def of_unit(part: FSDPModule) -> Iterator[tuple[Tensor | None, str]]:
    """Tensors that FSDP2 holds for one unit, each with its purpose."""
    state = part._get_fsdp_state()
    for group in state._fsdp_param_groups:
        if group._all_gather_result is not None:
            yield group._all_gather_result.all_gather_output, "{model} weights, gathered"
        yield group._partial_reduce_output, "gradients"
        for each in group.fsdp_params:
            yield each.sharded_param, "{model} weights"
            yield each.sharded_param.grad, "gradients"
            for output in each.all_gather_outputs:
                yield output, "{model} weights, gathered"
            yield each.unsharded_accumulated_grad, "gradients, not yet reduced"
            gathered = each._unsharded_param if "_unsharded_param" in vars(each) else None
            if gathered is not None:
                yield gathered, "{model} weights, gathered"
                yield gathered.grad, "gradients, not yet reduced"
    for reducing in state._comm_ctx.reduce_scatter_states:
        yield reducing.reduce_scatter_input, "gradients, not yet reduced"


def prolonged(longer: StepFootprint, shorter: StepFootprint, more: int) -> StepFootprint:
    """The figures of a step with more micro-batches.

    Args:
        longer: Of some micro-batches.
        shorter: Of one less.
        more: Micro-batches beyond those of `longer`.
    """
    before = {(each.kind, each.ranks, each.stride): each for each in shorter.collectives}
    collectives = []
    for each in longer.collectives:
        key = (each.kind, each.ranks, each.stride)
        less = before.get(key, replace(each, count=0, whole_bytes=0))
        collectives.append(
            replace(
                each,
                count=each.count + more * (each.count - less.count),
                whole_bytes=each.whole_bytes + more * (each.whole_bytes - less.whole_bytes),
            )
        )
    flops = longer.flops + more * (longer.flops - shorter.flops)
    return replace(longer, collectives=tuple(collectives), flops=flops)
