"""Notes about the text at the start of a run, and the number of steps of its epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from limbeck.config import OptimConfig, RunConfig
from limbeck.config.recipe import ROUNDING
from limbeck.data import HeldOut, TextData, overlap, reader_of
from limbeck.errors import ConfigError
from limbeck.registry import Problem


def with_steps(config: RunConfig, data: TextData) -> RunConfig:
    """The recipe with the steps that its epochs take on this text; as it is without epochs."""
    optim = config.optim
    if optim.epochs is None:
        return config
    rows = optim.epochs * data.num_rows
    steps = math.ceil(rows / optim.rows_per_step(config.data.sequence_length) - ROUNDING)
    optim = replace(optim, steps=max(1, steps), epochs=None)
    if problems := [str(problem) for problem in warmup_problems(optim)]:
        raise ConfigError("\n".join(problems))
    return replace(config, optim=optim)


def warmup_problems(optim: OptimConfig) -> Iterator[Problem]:
    """A warm-up that takes all steps."""
    if optim.num_warmup_steps >= optim.num_steps:
        yield Problem(
            "optim.warmup_steps",
            f"must be less than optim.steps = {optim.num_steps}, got {optim.num_warmup_steps}.",
        )


def epochs_note(epochs: float, config: RunConfig, data: TextData) -> str:
    """How many steps the epochs of a recipe are."""
    rows = config.optim.rows_per_step(config.data.sequence_length)
    return (
        f"optim.epochs: {epochs:g} passes over {data.num_rows:,} rows, {rows:,} a step, are "
        f"{config.optim.num_steps:,} steps."
    )


def data_notes(config: RunConfig, data: TextData, held_out: HeldOut | None) -> Iterator[str]:
    """Notes about the training and held-out text."""
    facts = data.facts
    texts = [data] if held_out is None else [data, held_out.data]
    if config.data.type == "auto":
        yield from dict.fromkeys(
            f"{text.facts['path']} is read as {reader_of(text.facts['type']).title}."
            for text in texts
        )
    for text in texts:
        bad = text.facts["bad_rows"]
        if bad["skipped"]:
            yield (
                f"{bad['skipped']:,} rows of {text.facts['path']} cannot be read and are left out, "
                f"{text.num_documents:,} are used; the first: {'; '.join(bad['first'])}."
            )
    if fell := [f"{count:,} {reason}" for reason, count in facts["dropped"].items() if count]:
        yield f"Left out of {facts['documents']:,} training documents: {', '.join(fell)}."
    if (count := facts["duplicates"]) == 1:
        yield "1 training document is a duplicate."
    elif count:
        yield f"{count:,} training documents are duplicates."
    if held_out is not None and (shared := overlap(data, held_out.data)):
        yield f"{shared} held-out documents also stand in the training text."
