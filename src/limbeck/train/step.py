"""One optimizer step, whose result does not depend on how it is cut into micro-batches.

The step's scored tokens are counted over all micro-batches and ranks before the first backward
pass, and every micro-batch's loss is divided by that count. Micro-batches and ranks then add up,
however unevenly they were filled.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from limbeck.batch import Batch
from limbeck.distributed import World, all_sum, cast_weights, plan_reduction, whole
from limbeck.distributed.stopping import SIGNALS, reason
from limbeck.losses import TeacherSignal
from limbeck.models import Distiller
from limbeck.teachers import Teacher


@dataclass(frozen=True)
class Accumulated:
    """The losses of a step whose gradients have been computed.

    Attributes:
        sums: The loss and each term's value, summed over this rank's micro-batches; on the device.
        losses: Loss share of each micro-batch of this rank; on the device.
    """

    names: tuple[str, ...]
    sums: Tensor
    losses: Tensor


class Counted(NamedTuple):
    """What all ranks know before a step.

    Attributes:
        tokens: N of the whole step.
        stop: The signal by which any rank was asked to stop.
        failed: Whether something failed on any rank since the last step.
        writing: Whether any rank is writing a checkpoint.
    """

    tokens: Int[Tensor, ""]
    stop: signal.Signals | None
    failed: bool
    writing: bool


@dataclass(frozen=True)
class StepOutcome:
    """The numbers of one step; means are over the scored tokens of all micro-batches and ranks.

    Attributes:
        shares: Each term's mean, unweighted.
        grad_norm: Norm of all gradients together, before clipping.
        is_finite: Whether loss and gradients are numbers. If not, no optimizer step was taken.
        failed: This rank's micro-batches whose loss was not finite.
    """

    loss: float
    shares: Mapping[str, float]
    grad_norm: float
    is_finite: bool
    failed: tuple[int, ...]


def count_step(
    micro_batches: Iterable[Batch],
    stop_counts: Sequence[int],
    world: World,
    *,
    failed: bool = False,
    writing: bool = False,
) -> Counted:
    """Agree with all ranks before a step.

    Args:
        world: The ranks; one all-reduce carries it all.
        failed: Whether something failed on this rank since the last step.
        writing: Whether this rank is writing a checkpoint.
    """
    local = sum(int(batch.on_host.num_scored()) for batch in micro_batches)
    numbers = [local, int(failed), int(writing), *stop_counts]
    total, failures, writers, *stops = all_sum(
        torch.tensor(numbers, dtype=world.exact, device=world.device)
    ).tolist()
    stop = reason([int(count) for count in stops])
    tokens = torch.tensor(int(total), device=world.device)
    return Counted(tokens, stop, failures > 0, writers > 0)


def accumulate(
    distiller: Distiller,
    teacher: Teacher | None,
    micro_batches: Sequence[Batch],
    step_tokens: Int[Tensor, ""],
    world: World,
    *,
    reduce_once: bool = True,
    seed: int | None = None,
    step: int = 0,
) -> Accumulated:
    """Run forward and backward on every micro-batch, and leave the sum of the gradients.

    Args:
        teacher: None when the objective reads nothing of a teacher.
        micro_batches: As many on every rank, so that all know the last one.
        reduce_once: Whether ranks add up gradients after the last micro-batch, or after each.
        step_tokens: N of the whole step.
        seed: Seeds dropout anew in every micro-batch, with the step, the rank and the micro-batch's
            number. Masks then depend on nothing that ran before, a failed attempt or a resumption,
            but on how a step is cut. None leaves the random state as it is.
    """
    names: tuple[str, ...] = ()
    values: list[Tensor] = []
    with cast_weights(distiller):
        for number, cpu_batch in enumerate(micro_batches):
            if seed is not None:
                seed_all((seed, step, world.rank, number))
            plan_reduction(distiller, once=reduce_once, is_last=number == len(micro_batches) - 1)
            batch = cpu_batch.to(world.device)
            teacher_signal = TeacherSignal() if teacher is None else teacher.signal(batch)
            loss, shares = distiller(batch, teacher_signal, step_tokens)
            if teacher is not None:
                teacher.release()  # all that reads the signal is done, the head too
            (loss * world.size).backward()  # FSDP averages gradients over ranks; we want their sum
            names = tuple(shares)
            values.append(torch.stack([loss.detach(), *shares.values()]).to(world.exact))
    table = torch.stack(values)
    return Accumulated(names, table.sum(0), table[:, 0])


def seed_all(key: tuple[int, ...]) -> None:
    """Seed PyTorch on all devices from several numbers, without collisions of their sums."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def apply(
    distiller: Distiller,
    optimizers: Iterable[torch.optim.Optimizer],
    accumulated: Accumulated,
    world: World,
    *,
    max_grad_norm: float = math.inf,
) -> StepOutcome:
    """Clip and step, if all is finite on all ranks; gradients are gone afterwards either way."""
    grad_norm = whole(get_total_norm(gradients(distiller)))
    sums = all_sum(accumulated.sums.clone())
    loss, *shares, norm = torch.cat([sums, grad_norm.to(sums).reshape(1)]).tolist()
    is_finite = all(math.isfinite(value) for value in (loss, *shares, norm))
    failed: tuple[int, ...] = ()
    if is_finite:
        trained = [p for p in distiller.parameters() if p.grad is not None]
        if norm > max_grad_norm:
            clip_grads_with_norm_(trained, max_grad_norm, grad_norm)
        for optimizer in optimizers:
            optimizer.step()
    else:
        failed = tuple((~accumulated.losses.isfinite()).nonzero().flatten().tolist())
    distiller.zero_grad(set_to_none=True)
    return StepOutcome(
        loss, dict(zip(accumulated.names, shares, strict=True)), norm, is_finite, failed
    )


def train_step(
    distiller: Distiller,
    teacher: Teacher | None,
    optimizers: Iterable[torch.optim.Optimizer],
    micro_batches: Sequence[Batch],
    world: World,
    *,
    max_grad_norm: float = math.inf,
    reduce_once: bool = True,
) -> StepOutcome:
    """One optimizer step on one rank's micro-batches; every rank has as many."""
    step_tokens, *_ = count_step(micro_batches, [0] * len(SIGNALS), world)
    accumulated = accumulate(
        distiller, teacher, micro_batches, step_tokens, world, reduce_once=reduce_once
    )
    return apply(distiller, optimizers, accumulated, world, max_grad_norm=max_grad_norm)


def gradients(distiller: Distiller) -> Iterator[Tensor]:
    """Every gradient there is."""
    return (p.grad for p in distiller.parameters() if p.grad is not None)
