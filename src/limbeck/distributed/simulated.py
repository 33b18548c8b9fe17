"""A simulated accelerator and process group: the code of a cluster on a machine without one.

Tensors have shapes and no numbers, collectives do nothing, and this process is rank 0, whose share
of every tensor is the largest. FSDP2, autograd and limbeck take the paths of a GPU. It rests on
private interfaces of torch, all of them named in this file and in `footprint.py`, and verified with
torch 2.13.0: the backend of PrivateUse1, the fake process group, and the answers below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.backend_registration as backends
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.distributed.ranks import World, make_mesh
from limbeck.errors import ConfigError
from limbeck.models import SIMULATED


class QuietEvent:
    """An event of a stream; recorded at once."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None:
        """Nothing to record."""

    def wait(self, *_: object) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class QuietStream:
    """A stream; unlike `torch.cpu`'s its events exist, as FSDP2 expects of an accelerator."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record_event(self, event: QuietEvent | None = None) -> QuietEvent:
        """An event that has happened."""
        return event or QuietEvent()

    def wait_event(self, _: QuietEvent) -> None:
        """Nothing to wait for."""

    def wait_stream(self, _: QuietStream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Backend(backends._DummyBackendModule):
    """What torch calls in the module of a device."""

    Stream, Event = QuietStream, QuietEvent

    def device_count(self) -> int:
        """Devices of a process."""
        return 1

    def set_device(self, _: int) -> None:
        """There is one."""

    def synchronize(self, *_: object) -> None:
        """Nothing to wait for."""

    def current_stream(self, *_: object) -> QuietStream:
        """A stream."""
        return QuietStream()

    def stream(self, _: QuietStream) -> AbstractContextManager[None]:
        """A context that changes nothing."""
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Formats of autocast."""
        return [torch.bfloat16, torch.float16]


class Answers(TorchDispatchMode):
    """Supplies the numbers that a step reads from the device.

    Every position is scored (`nonzero` of B positions gives B); a number read on the host is 0.0, 1
    or True: losses are finite, differences of two computations 0.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer, or compute shapes."""
        if DTensor in types:
            return NotImplemented  # its local tensors come next
        aten = torch.ops.aten
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is aten._local_scalar_dense.default:
            if args[0].is_floating_point():
                return 0.0
            return True if args[0].dtype == torch.bool else 1
        if func is aten._to_copy.default and args[0].constant is not None:
            args[0].constant = None  # else a number made on the CPU is copied for real
        return func(*args, **(kwargs or {}))


def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> Tensor:
    """The operations torch chooses on CUDA: flash attention, with a mask the efficient one."""
    aten = torch.ops.aten
    if attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        output: Tensor = flash(query, key, value, dropout_p, is_causal, False)[0]
        return output
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.masked_fill_(~attn_mask, -math.inf)
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    output = efficient(query, key, value, attn_mask, query.requires_grad)[0]
    return output


@contextmanager
def replaced(place: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """An attribute replaced: a function mode would be off while checkpoints compute again."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def prepare(name: str, device: str) -> None:
    """Register device and process group, which stay until the process ends."""
    if device == SIMULATED:
        backends._setup_privateuseone_for_python_backend(device, backend_module=Backend())
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) works
    dist.Backend.register_backend(name, _create_fake_pg, extended_api=True, devices=[device])


@contextmanager
def simulated_world(
    size: int, shard: str = "auto", device: str = SIMULATED, replicate: int = 1
) -> Iterator[World]:
    """Rank 0 of a cluster whose devices are not here; use it in a process of its own.

    Inside, every tensor that is made has a shape and no numbers.

    Args:
        size: Number of ranks.
        shard: As `parallel.shard`.
        device: The simulated accelerator; `cpu` takes the paths of a CPU, for comparison with gloo.
        replicate: As `parallel.replicate`.
    """
    if not 1 <= size <= 1 << 16:
        raise ConfigError(f"--world-size must be between 1 and 65536, got {size}.")
    name = f"fake_{device}"
    if name not in dist.Backend.backend_list:
        prepare(name, device)
    dist.init_process_group(name, store=FakeStore(), rank=0, world_size=size)
    place = torch.device(device, 0) if device == SIMULATED else torch.device(device)
    attention: AbstractContextManager[None] = nullcontext()
    if device == SIMULATED:
        functional = torch.nn.functional
        attention = replaced(functional, "scaled_dot_product_attention", cuda_attention)
    try:
        mesh = make_mesh(device, size, shard, replicate)
        with (
            FakeTensorMode(),
            Answers(),  # type: ignore[no-untyped-call]
            attention,
            torch.autograd.set_multithreading_enabled(False),
            # Found in numbers that are not there: rank 0 is the first of each group.
            replaced(DeviceMesh, "_compute_coordinate_on_dim", lambda mesh: (0,) * mesh.ndim),
            torch.device(place),  # models are made there: torch cannot move one without numbers
            replaced(nn.Module, "to", lambda module, *_, **__: module),
        ):
            yield World(0, size, place, mesh, simulated=True)
    finally:
        dist.destroy_process_group()
