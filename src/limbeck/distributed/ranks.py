"""Process groups and collectives.

Every function works for a single process too, which is a world of size 1 without communication.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from limbeck.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    RunError,
    StorageError,
    TryLaterError,
)

PACKAGE = Path(__file__).parents[1]

TIMEOUT_S = 1800
"""Longest wait for another rank unless a recipe says otherwise, in seconds."""

KINDS = (ConfigError, DataError, RunError, NonFiniteError, StorageError, TryLaterError)
"""Errors that `together` raises on every rank as their own class; others become a RunError."""

WAITING = (
    "Timed out waiting",
    "timed out",
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "collective operation timeout",
    "remote process exiting",
)
"""Words of errors of gloo and, the last two, of NCCL when another rank does not answer."""

GROUPS = count()
"""Numbers of this process's process groups, the same on every rank: one a stage of a recipe."""


@dataclass(frozen=True)
class World:
    """One process among all processes of the run.

    Attributes:
        rank: 0 to size - 1; rank 0 writes files and prints.
        size: Number of processes.
        device: Where this process computes.
        mesh: What models are sharded over; None for a single process that is not sharded.
        simulated: Whether the other ranks are simulated, and tensors have shapes only.
        offload: Whether models that are sharded over it keep their shards in host memory.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    simulated: bool = False
    offload: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def unsharded(self) -> World:
        """The same ranks, each of which keeps whole models."""
        return replace(self, mesh=None)

    def for_teacher(self, way: str) -> World:
        """The same ranks for a teacher, which `parallel.teacher` may keep in another way."""
        return self.unsharded if way == "replicate" else replace(self, offload=way == "offload")

    @property
    def home(self) -> torch.device:
        """Where the shards of models are."""
        return torch.device("cpu") if self.offload else self.device

    @property
    def reads_files(self) -> bool:
        """Whether this process reads and hashes the weights of models, once for all ranks."""
        return self.is_main and not self.simulated

    @property
    def exact(self) -> torch.dtype:
        """Data type of reduced counts and sums: float32 counts exactly only to 16.7 million."""
        return torch.float32 if self.device.type == "mps" else torch.float64


@contextmanager
def world(
    device: torch.device,
    shard: str = "auto",
    timeout_s: int = TIMEOUT_S,
    replicate: int = 1,
) -> Iterator[World]:
    """Join the processes torchrun started, or be the only one.

    Args:
        device: What to compute on; with several CUDA ranks each takes its own card.
        shard: `auto` shards models over all ranks, `none` keeps a whole copy on each; `always`
            makes a mesh for a single process on a CPU too.
        timeout_s: Seconds after which a collective that some rank did not join fails.
        replicate: Copies of the models, each sharded over a part of the ranks.

    Raises:
        ConfigError: The device has no backend of torch.distributed, or the ranks cannot be divided.
        RunError: Another rank did not come to a collective in time, or ended.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    sharded = launched or device.type == "cuda" or shard == "always"
    if not sharded:
        require_divided(1, replicate)
        yield World(0, 1, device)
        return
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            "torchrun and parallel.shard=always need CPU or CUDA, "
            f"got device {device.type!r}. Set device=cpu, or use neither."
        )
    if launched and device.type == "cuda":
        device = own_card()
    if device.index is not None:
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with (
        late_ranks_named(timeout_s),
        process_group(backend, alone=not launched, timeout_s=timeout_s),
    ):
        size = dist.get_world_size()
        mesh = make_mesh(device.type, size, shard, replicate, timeout_s)
        yield World(dist.get_rank(), size, device, mesh)


def own_card() -> torch.device:
    """The card of this rank.

    Raises:
        ConfigError: Several ranks are to run, and nothing says which card is whose.
    """
    number = os.environ.get("LOCAL_RANK")
    if number is None and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError(
            "Each of several ranks needs its own GPU, and LOCAL_RANK, its number on this machine, "
            "is not set. Start the ranks with torchrun, or set it as RANK is set."
        )
    return torch.device("cuda", int(number or "0"))


def make_mesh(
    device_type: str, size: int, shard: str, replicate: int = 1, timeout_s: int = TIMEOUT_S
) -> DeviceMesh:
    """What models are sharded over; `none` gives each rank a whole copy.

    Raises:
        ConfigError: The ranks cannot be divided into so many groups.
    """
    require_divided(size, replicate)
    if shard == "none":
        replicate = size
    if shard == "none" or replicate > 1:
        ranks = torch.arange(size).view(replicate, -1)
        groups = [group_among(each.tolist(), timeout_s) for each in (ranks.T, ranks)]
        names = ("replicate", "shard")
        return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)
    return init_device_mesh(device_type, (size,))


def group_among(ranks: list[list[int]], timeout_s: int) -> dist.ProcessGroup:
    """The group of this rank, with a time-out: those of `init_device_mesh` have PyTorch's own."""
    if len(ranks) == 1:
        assert dist.group.WORLD is not None, "make_mesh needs a process group"
        return dist.group.WORLD
    limit = timedelta(seconds=timeout_s)
    own: dist.ProcessGroup = dist.new_subgroups_by_enumeration(ranks, timeout=limit)[0]
    return own


def is_main_process() -> bool:
    """Whether this process is rank 0, known without a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def require_divided(size: int, replicate: int) -> None:
    """Refuse a number of copies that does not divide the ranks."""
    if size % replicate:
        raise ConfigError(
            f"parallel.replicate must divide the number of ranks, got parallel.replicate = "
            f"{replicate} and {size} {'rank' if size == 1 else 'ranks'}. Give the number of nodes, "
            "or 1."
        )


@contextmanager
def process_group(backend: str, *, alone: bool, timeout_s: int = TIMEOUT_S) -> Iterator[None]:
    """The default process group: torchrun's, or of this process alone, which opens no port.

    After an error NCCL's group is left as it is, and the process must end with `os._exit`: to
    destroy it waits for collectives that another rank may never join.
    """
    may_hang = backend == "nccl" and not alone
    if alone:
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, not re-exported
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        shared, rank, size = launchers_store(timeout_s)
        # The store still has the keys of earlier groups: addresses that no one listens at.
        own = PrefixStore(f"limbeck/{next(GROUPS)}", shared)
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    try:
        yield
    except BaseException:
        if not may_hang:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@cache
def launchers_store(timeout_s: int) -> tuple[Store, int, int]:
    """The launcher's store of keys, this process's rank and the number of ranks.

    Kept as long as the process, because rank 0 serves it where torchrun does not.
    """
    limit = timedelta(seconds=timeout_s)
    joined: tuple[Store, int, int] = next(rendezvous("env://", timeout=limit))
    return joined


@contextmanager
def late_ranks_named(timeout_s: int) -> Iterator[None]:
    """Turn the errors of a collective that another rank did not join into one that says so.

    NCCL's watchdog ends the process instead, after it has logged the collective.

    Raises:
        RunError: With this rank, what it waited in, and what to do; or, of another error of NCCL,
            with its whole text, whose last lines name the cause.
    """
    try:
        yield
    except RuntimeError as error:
        rank, text = os.environ.get("RANK", "0"), str(error)
        is_late = any(word in text for word in WAITING)
        if isinstance(error, RunError) or not (is_late or isinstance(error, dist.DistError)):
            raise
        if isinstance(error, dist.DistBackendError) and not is_late:
            raise RunError(
                f"Ranks must be able to communicate, and rank {rank} could not in "
                f"{place_of(error)}. Remove the cause, and continue with --resume: {text}"
            ) from error
        raise RunError(
            f"Rank {rank} waited in {place_of(error)}, and another rank did "
            f"not come: {text.splitlines()[0]} That rank ended, hangs, or worked alone for "
            f"longer than parallel.timeout_s = {timeout_s} s. Look at its messages, raise "
            "parallel.timeout_s if it needs more time, and continue with --resume."
        ) from error


def place_of(error: BaseException) -> str:
    """The innermost two functions of limbeck that an error passed through."""
    frames = [
        ".".join((*Path(frame.filename).relative_to(PACKAGE).with_suffix("").parts, frame.name))
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return " of ".join(reversed(frames[-2:])) or "torch.distributed"


def all_sum(value: Tensor) -> Tensor:
    """Sum over all ranks, in place, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with rank 0's, on every rank; shapes and order must agree."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value on every rank; JSON only, because unpickling can run code."""
    return gather_objects(value, world)[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value, in rank order, on every rank; JSON only."""
    if world.size == 1 or world.simulated:
        return [value] * world.size
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    lengths[world.rank] = len(encoded)
    sizes = all_sum(lengths).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=world.device)
    padded[: len(encoded)] = encoded.to(world.device)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    pairs = zip(gathered, sizes, strict=True)
    return [json.loads(bytes(text[:size].cpu().tolist())) for text, size in pairs]


def together(action: Callable[[], None], world: World, *, main_only: bool = False) -> None:
    """Run an action on every rank, or on rank 0 only; if it fails on one rank, it fails on all.

    Otherwise the ranks that did not fail would wait for the failed one until a time-out.

    Raises:
        LimbeckError: On every rank that of the first failing rank, so that all exit with one code.
    """
    failure: BaseException | None = None
    if world.is_main or not main_only:
        try:
            action()
        except BaseException as error:  # DCP's errors are BaseExceptions
            failure = error
    if world.size == 1:
        if failure is not None:
            raise failure
        return
    failures = [each for each in gather_objects(described(failure), world) if each is not None]
    if failures:
        name, _ = failures[0]
        if failure is not None and type(failure).__name__ == name:
            raise failure
        raise error_of("A rank", failures[0]) from failure


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Run the body on rank 0, as a download into a shared cache, while the others wait, then there.

    Raises:
        LimbeckError: On every rank rank 0's error, so that none waits for a rank that failed.
    """
    failure: BaseException | None = None
    if world.is_main:
        try:
            yield
        except BaseException as error:
            failure = error
    words = broadcast_object(described(failure), world)
    if failure is not None:
        raise failure
    if words is not None:
        raise error_of("Rank 0", words)
    if not world.is_main:
        yield


def described(failure: BaseException | None) -> tuple[str, str] | None:
    """Class name and message of an error, from which other ranks raise it again."""
    if failure is None:
        return None
    if isinstance(failure, KINDS):
        return type(failure).__name__, str(failure)
    kind = StorageError if isinstance(failure, OSError) else RunError
    return kind.__name__, f"{type(failure).__name__}: {failure}"


def error_of(who: str, words: tuple[str, str]) -> Exception:
    """The error that another rank `described`."""
    name, text = words
    kind = next((kind for kind in KINDS if kind.__name__ == name), RunError)
    return kind(f"{who} failed: {text}")
