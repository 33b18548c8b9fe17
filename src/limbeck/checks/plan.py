"""Estimated memory, disk and time of a run, from one measured micro-batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from limbeck.batch import Batch
from limbeck.checks.case import Case
from limbeck.checks.hardware import Hardware
from limbeck.checks.proof import Proof
from limbeck.config import OptimConfig, RunConfig
from limbeck.data import spread
from limbeck.distributed import Collective, cast_bytes, cast_weights, is_sharded, moment_bytes
from limbeck.errors import ConfigError
from limbeck.files import nearest_existing, size
from limbeck.losses.head.fused import head_bytes
from limbeck.models import CausalLM, Distiller, kept_values
from limbeck.teachers import TeacherRequest


@dataclass(frozen=True)
class TimedBatch:
    """One forward and backward pass of one micro-batch, the teacher's included.

    Attributes:
        seconds: Duration; later passes of the same shape may be faster.
        saved_bytes: Bytes the forward pass saved for backward.
    """

    rows: int
    tokens: int
    seconds: float
    saved_bytes: int


@dataclass(frozen=True)
class Disk:
    """Disk space a run needs, and free space.

    Attributes:
        checkpoint_bytes: One checkpoint: what is trained, in float32, and the optimizer's state.
        needed_bytes: All kept checkpoints, one being written, and the students.
    """

    checkpoint_bytes: int
    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Fix:
    """A change of the recipe, dry-run as well.

    Attributes:
        peak_bytes: Of all tensors at the step's peak.
        fits: Whether they fit, with the margin.
    """

    overrides: str
    peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Cluster:
    """The plan for a cluster; figures are of one rank and one step.

    Attributes:
        margin_bytes: A guess: what the device holds beside the tensors.
        collectives: By kind and group.
        flops: Of matrix products and attention.
        compute_seconds: At `cluster.COMPUTE_SHARE` of the stated FLOP/s.
        communication_seconds: At `cluster.LINK_SHARE` of the stated bandwidth.
        slowest_tokens_per_second: If nothing is sent while the device computes.
        idle_ranks: Ranks without a row in a step.
        fixes: Changes of the recipe that make it fit, with the peak that each leads to.
    """

    ranks: int
    hardware: Hardware
    margin_bytes: int
    collectives: tuple[Collective, ...]
    flops: int
    compute_seconds: float
    communication_seconds: float
    slowest_tokens_per_second: float
    idle_ranks: int
    fixes: tuple[Fix, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Estimated resources of a run.

    Attributes:
        parameters: By model.
        trained_parameters: Of the student, and of what the objective's terms own.
        memory_bytes: By purpose, at the same time.
        free_memory_bytes: On the models' device, after loading them.
        passes_over_text: How often each student reads the text; None if it was not read.
        students: Students trained: trials times learning rates.
        tokens_per_second: Scored tokens, from the measured pass.
        seconds: Forward and backward passes of all steps, without evaluation, saving and optimizer.
        host_bytes: Of an offloaded teacher's shards, in host memory; of one rank.
        cluster: The ranks, if they are simulated. Memory is then that of one rank, and
            `free_memory_bytes` all of its device; times follow from stated figures.
    """

    parameters: Mapping[str, int]
    trained_parameters: int
    memory_bytes: Mapping[str, int]
    free_memory_bytes: int
    disk: Disk
    micro_batch: int
    micro_batches_per_step: int
    steps: int
    passes_over_text: float | None
    students: int
    tokens_per_second: float
    seconds: float
    host_bytes: int = 0
    cluster: Cluster | None = None


def make_plan(
    case: Case, config: RunConfig, *, micro_batch: int, students: int, free_memory_bytes: int
) -> Plan:
    """Plan a run by running one micro-batch.

    Raises:
        ConfigError: The micro-batch does not fit into memory.
    """
    rows_per_step = config.optim.rows_per_step(config.data.sequence_length)
    count, available = min(micro_batch, rows_per_step), case.data.num_rows
    measured = run_micro_batch(case, case.data.batch(spread(available, count)))
    passes = -(-rows_per_step // measured.rows)
    state = state_bytes(case.distiller, config.optim)
    host, cast = offloaded_bytes(case.teacher_model, case.device), cast_bytes(case.distiller)
    return Plan(
        parameters={who: model.num_parameters for who, model in case.models}
        | ({"teacher": case.teacher.info.parameters} if case.teacher.info.parameters else {}),
        trained_parameters=sum(p.numel() for p in case.distiller.parameters() if p.requires_grad),
        memory_bytes={
            "teacher": held_bytes(case.teacher_model) - host,
            "student": held_bytes(case.distiller, case.teacher_model)
            + sum(layer.nbytes for layer in case.student.packed.values()),
            **({"weights in parallel.compute_dtype": cast} if cast else {}),
            "gradients": trained_bytes(case.distiller),
            "optimizer state": state,
            "one micro-batch's activations": measured.saved_bytes
            + checkpointed_bytes(case.student, config, measured.rows),
            "logits (head_budget_mb)": head_bytes(
                config.memory.head_budget_mb, case.vocabulary.size, case.device
            ),
        },
        free_memory_bytes=free_memory_bytes,
        disk=plan_disk(case.distiller, config, state, students),
        micro_batch=measured.rows,
        micro_batches_per_step=passes,
        steps=config.optim.num_steps,
        passes_over_text=rows_per_step * config.optim.num_steps / available,
        students=students,
        tokens_per_second=measured.tokens / measured.seconds,
        seconds=measured.seconds
        * rows_per_step
        / measured.rows
        * config.optim.num_steps
        * students,
        host_bytes=host,
    )


def run_micro_batch(case: Case, cpu_batch: Batch) -> TimedBatch:
    """Forward and backward of one micro-batch, as in training; weights are unchanged.

    Raises:
        ConfigError: It does not fit into memory.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in saved and not is_weight(storage.data_ptr()):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def is_weight(pointer: int) -> bool:
        # A block's weights are gathered, to other storage, when its forward pass begins.
        present = (p for p in case.distiller.parameters() if not is_sharded(p))
        return any(p.untyped_storage().data_ptr() == pointer for p in present)

    batch = cpu_batch.to(case.device)
    case.teacher.require(TeacherRequest(needs=case.distiller.objective.needs))
    tokens = int(batch.num_scored())
    was_training = case.distiller.training
    case.distiller.train()
    start = time.perf_counter()
    try:
        with cast_weights(case.distiller):
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, _ = case.distiller(batch, case.teacher.signal(batch), batch.num_scored())
            loss.backward()
        float(loss.detach())  # waits for the device
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"memory: a micro-batch of {len(batch.scored)} rows of {batch.scored.shape[1]} "
            "positions must fit beside both models, and does not. Lower memory.micro_batch, "
            "memory.head_budget_mb or data.sequence_length, or set "
            "memory.activation_checkpointing=full."
        ) from error
    finally:
        case.distiller.zero_grad(set_to_none=True)
        case.distiller.train(was_training)
    return TimedBatch(len(batch.scored), tokens, seconds, sum(saved.values()))


def plan_disk(distiller: Distiller, config: RunConfig, state: int, students: int) -> Disk:
    """Disk space for checkpoints and students, and free space."""
    keep = config.checkpoint.keep + config.checkpoint.keep_best + 1  # one is being written
    weights = trained_bytes(distiller)
    student = sum(p.numel() * p.element_size() for p in distiller.student.parameters())
    student += sum(4 * layer.numel for layer in distiller.student.packed.values())
    kept = min(keep, -(-config.optim.num_steps // config.checkpoint.every) + 1)
    saved_students = students + (students > 1)  # several start from one that is saved
    needed = students * kept * (weights + state) + saved_students * student
    return Disk(weights + state, needed, shutil.disk_usage(nearest_existing(config.output)).free)


def plan_findings(plan: Plan) -> list[Proof]:
    """Whether disk and memory suffice, by the estimates."""
    memory = sum(plan.memory_bytes.values())
    loaded = plan.memory_bytes["teacher"] + plan.memory_bytes["student"]
    free = plan.free_memory_bytes + loaded
    return [
        Proof(
            "disk",
            plan.disk.needed_bytes <= plan.disk.free_bytes,
            f"{size(plan.disk.needed_bytes)} needed, {size(plan.disk.free_bytes)} free (estimate)",
            "checkpoints and students fit; lower checkpoint.keep, or write elsewhere, if not",
        ),
        Proof(
            "memory",
            memory <= free,
            f"{size(memory)} needed, {size(free)} available (estimate)",
            "models, gradients, optimizer state and one micro-batch fit; lower memory.micro_batch "
            "or set memory.activation_checkpointing=full if not",
            decides=False,
        ),
    ]


def held_bytes(module: nn.Module, beside: nn.Module | None = None) -> int:
    """Bytes of a module's parameters and buffers, tied ones counted once.

    Args:
        beside: Tensors of this module are not counted.
    """
    counted = set() if beside is None else {*beside.parameters(), *beside.buffers()}
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t not in counted]
    return sum(t.numel() * t.element_size() for t in tensors)


def offloaded_bytes(module: nn.Module, device: torch.device) -> int:
    """Bytes of a module's parameters that are not on its device."""
    return sum(p.nbytes for p in module.parameters() if p.device.type != device.type)


def trained_bytes(distiller: Distiller) -> int:
    """Bytes of the trained parameters, and of their gradients."""
    return sum(p.numel() * p.element_size() for p in distiller.parameters() if p.requires_grad)


def state_bytes(distiller: Distiller, optim: OptimConfig) -> int:
    """Bytes of the optimizer's moments."""
    trained = [p for p in distiller.parameters() if p.requires_grad]
    whole = trained_bytes(distiller)
    match optim.type:
        case "adamw":
            return 2 * whole
        case "adamw_8bit":
            return sum(moment_bytes(p) for p in trained)
        case "sgd":
            return whole if optim.momentum else 0
        case "muon":
            matrices = (p for p in distiller.student.blocks.parameters() if p.ndim == 2)
            blocks = [p for p in matrices if p.requires_grad]
            return 2 * whole - sum(p.numel() * p.element_size() for p in blocks)
        case "adafactor":  # a row and a column of each matrix
            numbers = [sum(p.shape) if p.ndim > 1 else p.numel() for p in trained]
            return sum(n * p.element_size() for n, p in zip(numbers, trained, strict=True))


def checkpointed_bytes(student: CausalLM, config: RunConfig, rows: int) -> int:
    """Bytes that activation checkpointing keeps and hides from autograd's hooks, an estimate."""
    kept = config.memory.activation_checkpointing
    if kept == "none":
        return 0
    element = student.computed_in.itemsize
    values = sum(kept_values(block, student.width, kept) for block in student.blocks)
    return rows * config.data.sequence_length * values * element
