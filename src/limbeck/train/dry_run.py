"""Optimizer steps of one simulated rank: what it holds, sends and computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from limbeck.batch import Batch
from limbeck.config import RunConfig
from limbeck.distributed import Footprint, StepFootprint, World, by_purpose, local, prolonged
from limbeck.models import Distiller, checkpoint_activations
from limbeck.teachers import Teacher, require_all_local
from limbeck.train.micro_batch import reduces_once
from limbeck.train.optimizers import make_optimizers
from limbeck.train.step import train_step

REPEATED = 2
"""Micro-batches that are run; all after the first cost the same."""
NEAR_PEAK = 0.98
"""A step's peak is at least this part of the lowest peak of the steps before."""
TRIES = 5
"""Real steps for each look at the peak; a simulated one suffices. gloo's threads let go of a
collective's tensors some time after it is done, on a busy machine after the next peak: that step's
peak is too high, or changes while it is looked at. The lowest peak of several is taken."""


def dry_run(
    distiller: Distiller,
    teacher: Teacher,
    config: RunConfig,
    world: World,
    *,
    micro_batch: int,
    passes: int,
) -> StepFootprint:
    """Run steps of training on simulated tensors, and count.

    The first step makes the optimizer's state, the next finds how high the peak is, another one
    says of what it consists.

    Args:
        teacher: With weights here, or several of such; its needs are those of the objective.
        micro_batch: Rows of a micro-batch, each position scored.
        passes: Micro-batches of this rank in a step.
    """
    checkpoint_activations(distiller.student, config.memory.activation_checkpointing)
    # The device decides only whether there is a fused kernel, and the real one has it.
    cuda = torch.device("cuda")
    optimizers = make_optimizers(distiller, config.optim, 1e-4, cuda)
    distiller.train()
    length = config.data.sequence_length
    tokens = torch.zeros(micro_batch, length + 1, dtype=torch.int64, device=world.device)
    batch = Batch.from_tokens(tokens)
    teachers = nn.ModuleList(each.model for each in require_all_local(teacher, "a dry run"))
    models = {"student": distiller, "teacher": teachers}
    footprint = Footprint(models.values(), world.device.type)
    shards = [local(parameter) for parameter in teachers.parameters()]
    host = sum(t.untyped_storage().nbytes() for t in shards if t.device.type != world.device.type)
    once = reduces_once(config.memory, distiller, world)

    def step(micro_batches: int) -> None:
        batches = [batch] * micro_batches
        train_step(distiller, teacher, optimizers, batches, world, reduce_once=once)

    def look() -> Mapping[str, int]:
        return by_purpose(footprint, models, optimizers, distiller.student.vocabulary_size)

    repeated = min(passes, REPEATED)
    with footprint:
        step(repeated)
        tries = 1 if world.simulated else TRIES
        held = at_peak(footprint, partial(step, repeated), look, tries)
        figures = StepFootprint(held, footprint.collectives, footprint.flops, host)
        if passes > repeated:
            footprint.reset()
            step(repeated - 1)
            shorter = StepFootprint({}, footprint.collectives, footprint.flops)
            figures = prolonged(figures, shorter, passes - repeated)
    return figures


def at_peak(
    footprint: Footprint,
    step: Callable[[], None],
    look: Callable[[], Mapping[str, int]],
    tries: int,
) -> Mapping[str, int]:
    """What `look` says at the peak of a step; `tries` steps find the peak, as many more look."""
    peaks = []
    for _ in range(tries):
        footprint.reset()
        step()
        peaks.append(footprint.peak_bytes)
    lowest, found = min(peaks), None
    seen: list[Mapping[str, int]] = []

    def keep() -> None:
        seen.append(look())

    for _ in range(tries):
        footprint.reset(NEAR_PEAK * lowest, keep)
        step()
        if seen and footprint.peak_bytes == sum(seen[-1].values()) == lowest:
            found = seen[-1]
        seen.clear()
    assert found is not None, "not the peak"
    return found
