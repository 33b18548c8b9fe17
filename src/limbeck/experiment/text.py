"""Notes about the text at the start of a run, and the number of steps of its epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from limbeck.config import OptimConfig, RunConfig
from limbeck.config.recipe import ROUNDING
from limbeck.data import HeldOut, TextData, held_out_configs, overlap, passes, reader_of
from limbeck.data.mixture import MOST_PASSES
from limbeck.errors import ConfigError
from limbeck.registry import Problem, type_of


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


def data_notes(
    config: RunConfig, data: TextData, held_out_sets: Mapping[str, HeldOut]
) -> Iterator[str]:
    """Notes about the training and held-out text."""
    facts = data.facts
    read = list(zip(config.data.texts, data.text_facts, strict=True))
    specs = held_out_configs(config)
    read += [(specs[name], each.data.facts) for name, each in held_out_sets.items()]
    yield from dict.fromkeys(
        f"{text['path']} is read as {reader_of(text['type']).title}."
        for spec, text in read
        if spec.type == "auto"
    )
    for _, text in read:
        bad = text["bad_rows"]
        if bad["skipped"]:
            yield (
                f"{bad['skipped']:,} rows of {text['path']} cannot be read and are left out, "
                f"{text['documents']:,} are used; the first: {'; '.join(bad['first'])}."
            )
    yield from mixture_notes(config, data)
    alpha = config.objective.alpha
    if type_of(config.teacher) == "cross_tokenizer" and isinstance(alpha, float) and alpha > 0.5:
        yield (
            f"Warning: objective.alpha {alpha:g} with a teacher of another tokenizer. In limbeck's "
            "study 0.3 always predicted text better than cross-entropy alone, and 0.9 never: try "
            "0.3."
        )
    if fell := [f"{count:,} {reason}" for reason, count in facts["dropped"].items() if count]:
        yield f"Left out of {facts['documents']:,} training documents: {', '.join(fell)}."
    if (count := facts["duplicates"]) == 1:
        yield "1 training document is a duplicate."
    elif count:
        yield f"{count:,} training documents are duplicates."
    for name, each in held_out_sets.items():
        if shared := overlap(data, each.data):
            of = f" of {name}" if name else ""
            yield f"{shared} held-out documents{of} also stand in the training text."


def held_out_facts(held_out_sets: Mapping[str, HeldOut]) -> dict[str, Any]:
    """Facts of the held-out text that chooses, and of each where there are several."""
    facts = {name: each.data.facts for name, each in held_out_sets.items()}
    several = {"held_out_sets": facts} if len(facts) > 1 else {}
    return {"held_out": next(iter(facts.values()), None), **several}


def mixture_notes(config: RunConfig, data: TextData) -> Iterator[str]:
    """How much of each source of a mixture a run reads, and which are repeated or cut short."""
    if not data.sources or type_of(config.data.source) != "shuffled":
        return
    rows = config.optim.rows_per_step(config.data.sequence_length) * config.optim.num_steps
    read, weights = passes(data, rows), sum(source.weight for source in data.sources)
    for source in data.sources:
        yield (
            f"Mixture: {source.name} gives {source.weight / weights:.1%} of the trained tokens; "
            f"its {source.num_rows:,} rows, {source.num_scored:,} tokens, are read "
            f"{read[source.name]:.2g} times."
        )
    repeated = [
        f"{name} ({count:.2g} times)" for name, count in read.items() if count > MOST_PASSES
    ]
    cut_short = [f"{name} ({count:.0%})" for name, count in read.items() if count < 1]
    if repeated and cut_short:
        yield (
            f"Warning: the mixture reads {', '.join(repeated)} over and over, and only a part of "
            f"{', '.join(cut_short)}. After {MOST_PASSES:g} passes a text teaches less and less; "
            "lower its weight, or give more of it."
        )
