"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from limbeck.config import OptimConfig
from limbeck.errors import ConfigError
from limbeck.registry import Problem, suggest

NOT_OF_THE_STEP = {"reduce_lr_on_plateau", "greedy"}
"""Schedules that depend on the loss, not on the step alone."""

OURS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def schedule_names() -> list[str]:
    """Names `optim.schedule` may have."""
    return sorted({kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION} - NOT_OF_THE_STEP)


def make_schedule(optim: OptimConfig, learning_rate: float) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0."""
    if problems := list(schedule_problems(optim)):
        raise ConfigError("\n".join(map(str, problems)))
    # Schedules of transformers are made for an optimizer; only its learning rate is read.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    try:
        scheduler = get_scheduler(
            optim.schedule,
            stand_in,
            num_warmup_steps=optim.num_warmup_steps,
            num_training_steps=optim.num_steps,
            scheduler_specific_kwargs=dict(optim.schedule_options),
        )
        factor = cast(LambdaLR, scheduler).lr_lambdas[0]
        factor(0), factor(optim.num_steps - 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.schedule_options must suit the schedule {optim.schedule!r}, "
            f"got {dict(optim.schedule_options)}: {error}."
        ) from error
    return lambda step: learning_rate * factor(step)


def schedule_problems(optim: OptimConfig) -> Iterator[Problem]:
    """A schedule or an option that does not exist, and one that is missing."""
    known = schedule_names()
    name, given = optim.schedule, optim.schedule_options
    if name not in known:
        text = f"no such schedule {name!r}{suggest(name, known)}. Known: {', '.join(known)}."
        yield Problem("optim.schedule", text)
        return
    if name == "constant" and optim.warmup_steps:
        yield Problem(
            "optim.schedule",
            f"'constant' has no warm-up, and warmup_steps is {optim.warmup_steps}. "
            "Use 'constant_with_warmup', or leave warmup_steps out.",
        )
    options = schedule_options(name)
    takes = ", ".join(sorted(options)) or "none"
    for option in (each for each in given if each not in options):
        yield Problem(
            f"optim.schedule_options.{option}",
            f"{name!r} takes no such option{suggest(option, options)}. It takes: {takes}.",
        )
    for option, parameter in options.items():
        if parameter.default is parameter.empty and option not in given:
            text = f"{name!r} needs this option, and it is missing."
            yield Problem(f"optim.schedule_options.{option}", text)


def schedule_options(name: str) -> dict[str, inspect.Parameter]:
    """The options a schedule takes besides warm-up and steps."""
    function: Any = next(f for kind, f in TYPE_TO_SCHEDULER_FUNCTION.items() if kind.value == name)
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in parameters.items() if key not in OURS}
