"""Rows of one forward and backward pass."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import nn

from limbeck.config import MemoryConfig
from limbeck.config.recipe import ActivationCheckpointing
from limbeck.distributed import World, gather_objects, local
from limbeck.errors import RunError
from limbeck.heap import return_freed
from limbeck.losses.head.fused import head_bytes
from limbeck.models import CausalLM, kept_values

KNOBS = (
    "Lower memory.micro_batch, memory.head_budget_mb or data.sequence_length, or set "
    "memory.activation_checkpointing=full."
)
SHARE = 0.5
"""Part of the free memory a micro-batch's activations may take; the rest is for gradients,
optimizer state, the teacher and what an estimate cannot see."""

WHOLE_GRADIENTS = 1 / 8
"""Part of a device's memory that reducing once a step may take: 10 GiB of 80, whole gradients of
2.5 B parameters."""

NO_LIMIT = 1 << 62

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_status_alloc_failed")
"""Parts of messages in lower case; the last is that of cuBLAS and other libraries of CUDA."""

CPU_TOKENS = 4096
"""Positions of a micro-batch beyond which a CPU does not get faster."""


def choose_micro_batch(
    memory: MemoryConfig,
    student: CausalLM,
    world: World,
    *,
    sequence_length: int,
    most_rows: int,
    free_memory_bytes: int | None = None,
) -> int:
    """Rows of a micro-batch, the same on every rank.

    `auto` divides half of the free memory by an estimate of a row's activations (`row_bytes`). A
    single process halves it when memory runs out.

    Args:
        most_rows: Rows a rank has in a step; more would be of no use.
        free_memory_bytes: On the device; None measures it.
    """
    if memory.micro_batch != "auto":
        return min(memory.micro_batch, most_rows)
    room = head_bytes(memory.head_budget_mb, student.vocabulary_size, world.device)
    free = free_bytes(world.device) if free_memory_bytes is None else free_memory_bytes
    free -= room
    each = row_bytes(student, sequence_length, memory.activation_checkpointing)
    rows = int(SHARE * free) // each
    if world.device.type == "cpu":
        rows = min(rows // world.size, CPU_TOKENS // sequence_length)
    return int(min(gather_objects(max(1, min(rows, most_rows)), world)))


def reduces_once(
    memory: MemoryConfig,
    distiller: nn.Module,
    world: World,
    *,
    memory_bytes: int | None = None,
) -> bool:
    """Whether gradients are reduced once a step, the same on every rank.

    That saves a reduce-scatter of the student in each micro-batch but the last, and keeps whole
    gradients between them in place of this rank's shards.

    Args:
        memory_bytes: All of the device's; None asks it. What is free would change from one start
            of a run to the next, and with it the order of sums.
    """
    if memory.reduce_gradients != "auto":
        return memory.reduce_gradients == "step"
    trained = [p for p in distiller.parameters() if p.requires_grad]
    more = sum(p.numel() * p.element_size() - local(p).nbytes for p in trained)
    room = device_bytes(world) if memory_bytes is None else memory_bytes
    return all(gather_objects(more <= WHOLE_GRADIENTS * room, world))


def row_bytes(
    student: CausalLM, sequence_length: int, checkpointing: ActivationCheckpointing
) -> int:
    """Estimate of the activations one row keeps until its backward pass, bytes.

    With checkpointing the blocks keep less, and one at a time is computed again.
    """
    element = student.computed_in.itemsize
    kept = [kept_values(block, student.width, checkpointing) for block in student.blocks]
    whole = [kept_values(block, student.width, "none") for block in student.blocks]
    values = sum(kept) + max(w - k for w, k in zip(whole, kept, strict=True))
    return max(1, values * sequence_length * element)


def free_bytes(device: torch.device) -> int:
    """Memory that is free where the models are, in bytes.

    On CUDA that is also what torch holds for tensors to come; a CPU's is returned first.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return_freed()
    return min(int(psutil.virtual_memory().available), cgroup_room())


def used_bytes(device: torch.device) -> int:
    """Memory of this process: the largest use of a CUDA device so far, on others what it has now.

    Reading it waits for no device.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def device_bytes(world: World) -> int:
    """All memory where the models are, a rank's share of it on CPUs, in bytes."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    return min(int(psutil.virtual_memory().total), cgroup_bytes("max")) // world.size


def cgroup_room() -> int:
    """Free memory under a container's limit, bytes; about 2^62 without a limit."""
    used = cgroup_bytes("current")
    return cgroup_bytes("max") - (0 if used == NO_LIMIT else used)


def cgroup_bytes(name: str) -> int:
    """A figure of this container's memory; `NO_LIMIT` where there is none."""
    try:
        return int(Path(f"/sys/fs/cgroup/memory.{name}").read_text())
    except (OSError, ValueError):
        return NO_LIMIT


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in message for words in OUT_OF_MEMORY)
    )


def out_of_memory(micro_batch: int, sequence_length: int, num_ranks: int = 1) -> RunError:
    """The error to raise when a micro-batch does not fit and no smaller one is tried."""
    reason = (
        "With several ranks no smaller one is tried: the others already wait for this rank. "
        "memory.reduce_gradients=micro_batch also takes less. "
        if num_ranks > 1
        else ""
    )
    return RunError(
        f"A micro-batch must fit into memory; one of {micro_batch} rows of {sequence_length} "
        f"positions does not. {reason}{KNOBS}"
    )
