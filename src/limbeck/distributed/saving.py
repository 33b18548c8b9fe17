"""Writing checkpoints: planned by all ranks together, written by each alone, published together.

Between the first and the last no rank communicates, so a thread can write while training continues,
and every collective stays in the main thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from limbeck.distributed.checkpoints import (
    FORMAT,
    STATE,
    Optimizers,
    alone_quietly,
    checkpoint_name,
    discard,
    first_cause,
    parts_of,
    random_state,
    require_room,
)
from limbeck.distributed.ranks import World, broadcast_object, gather_objects, together
from limbeck.errors import StorageError
from limbeck.files import manifest, raise_if_storage, seal, sha256, staging, sync

Sums = Mapping[str, Sequence[Any]]
"""Size and sha256 of files, by name."""

T = TypeVar("T")


class HeldPlanner(DefaultSavePlanner):
    """Gives the writer what is held for it."""

    def __init__(self, held: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._held = held

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor of an item."""
        return self._held[write_item.index]


class HeldWriter(HuggingFaceStorageWriter):
    """Holds what this rank has to write when ranks plan a save, and writes it later."""

    def __init__(self, folder: Path, *, copies: bool) -> None:
        """
        Args:
            copies: Whether to hold copies, which later steps do not change.
        """
        super().__init__(str(folder), save_distributed=True)
        # What is held is on the CPU. To copy ahead, DCP would make a stream in the thread that
        # writes, where card 0 is the current one: a CUDA context of every rank there.
        self.per_thread_copy_ahead = 0
        self._folder, self._copies = folder, copies
        self._plan = SavePlan([])
        self._held: dict[MetadataIndex, Tensor] = {}

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Hold the data of a plan, in host memory."""
        self._plan = plan
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor), "checkpoints hold tensors"
            self._held[item.index] = data.detach().to("cpu", copy=self._copies)
        nothing: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        nothing.set_result([])
        return nothing

    def write(self) -> Sums:
        """Write, sync and hash what is held; no other rank takes part."""
        written = super().write_data(self._plan, HeldPlanner(self._held))
        written.wait()
        self._held = {}
        sums = {}
        for name in {result.storage_data.relative_path for result in written.value()}:
            path = self._folder / name
            sync(path)
            sums[name] = (path.stat().st_size, sha256(path))
        return sums


class Saving:
    """A checkpoint that is being written; `begin_saving` makes it."""

    def __init__(
        self, final: Path, temporary: Path, state: str, written: Future[Sums], world: World
    ) -> None:
        """
        Args:
            final: Its name.
            temporary: Where it is written.
            state: Contents of state.json.
            written: The sums of this rank's files.
        """
        self._final, self._temporary = final, temporary
        self._state, self._written, self._world = state, written, world

    @property
    def is_written(self) -> bool:
        """Whether this rank has no more to write; it may have failed."""
        return self._written.done()

    def finish(self) -> Path:
        """Wait for every rank's files and publish them; every rank calls it.

        Raises:
            StorageError: A rank could not write; older checkpoints are intact, and nothing is left
                of this one.
        """
        sums: dict[str, Sequence[Any]] = {}

        def wait() -> None:
            sums.update(self._written.result())

        def publish() -> None:
            (self._temporary / STATE).write_text(self._state, encoding="utf-8")
            facts = {"kind": "checkpoint", "step": json.loads(self._state)["step"]}
            seal(self._temporary, facts, known)
            if self._final.exists() and manifest(self._final) is None:
                discard(self._final)  # a damaged one of an earlier life does not exist
            self._temporary.rename(self._final)
            sync(self._final.parent)

        def both() -> None:
            together(wait, self._world)
            for each in gather_objects(sums, self._world):
                known.update(each)
            together(publish, self._world, main_only=True)

        known: dict[str, Sequence[Any]] = {}
        try:
            storage_named(both, self._final, self._temporary, self._world)
        finally:
            self._remove()
        return self._final

    def abandon(self) -> None:
        """Wait for this rank's files and publish nothing, where other ranks may be gone."""
        self._written.exception()  # waits
        self._remove()

    def _remove(self) -> None:
        if self._world.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)


def begin_saving(
    folder: Path,
    step: int,
    distiller: nn.Module,
    optimizers: Optimizers,
    facts: Mapping[str, Any],
    world: World,
    *,
    in_background: bool = False,
) -> Saving:
    """Begin a checkpoint, which `Saving.finish` publishes; every rank calls it.

    Args:
        folder: Directory of checkpoints.
        step: Optimizer steps taken; names the checkpoint.
        distiller: The student and its objective.
        optimizers: Theirs.
        facts: What `load_checkpoint` gives back, JSON.
        world: The ranks.
        in_background: Return when what this rank writes is copied to host memory, and write it in a
            thread. Else it is written before this returns.

    Raises:
        StorageError: The disk is full or may not be written; older checkpoints are intact.
    """
    final = folder / checkpoint_name(step)
    parts = parts_of(distiller, optimizers)
    states = gather_objects(random_state(world.device), world)
    needed = sum(t.numel() * t.element_size() for t in parts.tensors.values())  # copies once
    temporary = Path(broadcast_object(str(staging(final)), world))
    body = {
        "format": FORMAT,
        "step": step,
        "facts": dict(facts),
        "numbers": parts.numbers,
        "random": states,
    }
    writer = HeldWriter(temporary, copies=in_background)

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        require_room(final, needed)
        temporary.mkdir()

    def both() -> None:
        together(prepare, world, main_only=True)
        together(lambda: hold(parts.tensors, writer, world), world)

    try:
        storage_named(both, final, temporary, world)
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    state = json.dumps(body, sort_keys=True)
    return Saving(
        final, temporary, state, started(writer.write, in_background=in_background), world
    )


def hold(tensors: Mapping[str, Tensor], writer: HeldWriter, world: World) -> None:
    """Agree with all ranks on who writes what, and let the writer hold this rank's part."""
    try:
        with alone_quietly():
            save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as error:  # no Exception, and it hides its cause
        raise first_cause(error) from error


def storage_named(action: Callable[[], None], final: Path, temporary: Path, world: World) -> None:
    """Run an action of all ranks, with errors of the disk raised as `StorageError` on all."""

    def named() -> None:
        try:
            action()
        except BaseException as error:
            if world.is_main and not isinstance(error, StorageError):
                raise_if_storage(error, final, temporary)
            raise

    together(named, world)


def started(action: Callable[[], T], *, in_background: bool) -> Future[T]:
    """The future result of an action, which runs in a thread, or is done when this returns."""
    if in_background:
        pool = ThreadPoolExecutor(1, "checkpoint")
        future = pool.submit(action)
        pool.shutdown(wait=False)
        return future
    done: Future[T] = Future()
    try:
        done.set_result(action())
    except BaseException as error:
        done.set_exception(error)
    return done
