"""Pilot runs of a recipe: short, each finished to its own end, kept in OUTPUT/forecast."""

from __future__ import annotations

import gc
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.config import RunConfig, dump, read, to_plain
from limbeck.data.mixture import passes as mixture_passes
from limbeck.distributed import StopSignals, decided, locked, together
from limbeck.errors import ConfigError
from limbeck.evaluate.scaling import MIN_BUDGETS, MeasuredRun
from limbeck.experiment.batches import rollout_rows
from limbeck.experiment.run import Run
from limbeck.experiment.score_files import read_scores
from limbeck.experiment.trials import FORECAST, Trial, TrialRunner, lasting, trials_of
from limbeck.files import write_text
from limbeck.report.run_files import last_step, lines

SHARE = 0.2
"""Most of the recipe's steps that all pilots together take."""
RATIO = 2
"""Each pilot has this many times the steps of the one before."""
EXTRA = (2, 1)
"""Further runs of the smallest pilots, with another order of the text: how much do runs vary?"""
FACTS = "facts.json"
"""How often the recipe reads its text, and its student's parameters, beside the pilots."""
MIN_STEPS = 3
"""Fewer steps are no run whose learning rate rises and falls."""


@dataclass(frozen=True)
class Pilot:
    """A short run of a recipe.

    Attributes:
        config: The recipe with fewer steps; its output is the pilot's folder.
        repeat: 0, or the number of its repetition with another seed.
    """

    config: RunConfig
    repeat: int

    @property
    def name(self) -> str:
        """Steps, and the repetition."""
        return self.config.output.name

    @property
    def trials(self) -> list[Trial]:
        """The distilled student, and the cross-entropy baseline where the recipe has one."""
        return trials_of(self.config)

    @property
    def is_done(self) -> bool:
        """Whether all of its students were trained and measured."""
        return all(trial.scores.exists() for trial in self.trials)


@dataclass(frozen=True)
class Pilots:
    """Finished pilots of one kind of student.

    Attributes:
        runs: Each with its tokens and its scores on the test documents.
        seconds_per_token: Training time of the largest over its scored tokens.
        tokens_per_step: Scored tokens of a step, of the largest.
    """

    runs: tuple[MeasuredRun, ...]
    seconds_per_token: float
    tokens_per_step: float


@dataclass(frozen=True)
class Alternative:
    """Another recipe to compare with.

    Attributes:
        name: What it changes.
        pilots: Those that are finished.
    """

    name: str
    config: RunConfig
    pilots: Sequence[Pilot] = ()


def plan_pilots(config: RunConfig, count: int) -> list[Pilot]:
    """The pilots of a recipe, the smallest first: geometric budgets within a fifth of its steps.

    Raises:
        ConfigError: Too few pilots for a curve, or a recipe too short for so many; a grid of
            learning rates; no held-out text.
    """
    if count < MIN_BUDGETS:
        raise ConfigError(
            f"--pilots must be at least {MIN_BUDGETS}, the parameters of the curve, got {count}."
        )
    if not config.evaluate.data:
        raise ConfigError(
            "evaluate.data must name held-out text for a forecast, and names none. Add it to the "
            "recipe."
        )
    rates = (config.optim.learning_rate, config.evaluate.baseline_learning_rate)
    if any(isinstance(rate, tuple) for rate in rates):
        raise ConfigError(
            "optim.learning_rate must be one number for a forecast, got a grid. Give one, and "
            "evaluate.baseline_learning_rate if the baseline has a grid too."
        )
    units = [RATIO**i for i in range(count)]
    runs = [1 + extra for extra in (*EXTRA, *[0] * count)][:count]
    share = SHARE * config.optim.num_steps / sum(u * n for u, n in zip(units, runs, strict=True))
    steps = [math.floor(share * unit) for unit in units]
    if steps[0] < MIN_STEPS:
        least = math.ceil(MIN_STEPS * config.optim.num_steps / max(share, 1e-9))
        raise ConfigError(
            f"A fifth of the recipe's {config.optim.num_steps:,} steps is too little for {count} "
            f"pilots of at least {MIN_STEPS} steps each. Give optim.steps at least {least:,}, or "
            "fewer --pilots; or smaller steps (optim.tokens_per_step)."
        )
    return [
        pilot_of(config, number, repeat)
        for number, several in zip(steps, runs, strict=True)
        for repeat in range(several)
    ]


def pilot_of(config: RunConfig, steps: int, repeat: int) -> Pilot:
    """A run of so many steps; warm-up and schedule shrink with it, and only its end is measured."""
    name = f"steps-{steps}" + (f"-seed-{config.seed + repeat}" if repeat else "")
    return Pilot(
        replace(
            config,
            optim=config.optim.rescaled(steps),
            seed=config.seed + repeat,
            evaluate=replace(config.evaluate, every=steps, patience=None, controls=()),
            checkpoint=replace(config.checkpoint, every=steps, keep=1, keep_best=False),
            output=config.output / FORECAST / name,
            track=(),
        ),
        repeat,
    )


def run_pilots(
    config: RunConfig, count: int, *, overwrite: bool = False
) -> tuple[RunConfig, list[Pilot]]:
    """The finished pilots of a recipe; those that an earlier call finished are kept.

    Returns:
        The recipe, its epochs turned into steps, and its pilots, the smallest first.

    Raises:
        ConfigError: See `plan_pilots`; or earlier pilots are of another recipe.
        Stopped: A signal came; call it again to continue.
    """
    if overwrite:
        shutil.rmtree(config.output / FORECAST, ignore_errors=True)
    if config.optim.epochs is None:
        pilots = plan_pilots(config, count)
        require_same_recipe(pilots)
        if all(pilot.is_done for pilot in pilots) and (forecast_folder(config) / FACTS).exists():
            return config, pilots
    with Run(config) as run:
        pilots = plan_pilots(run.config, count)
        require_same_recipe(pilots)
        with StopSignals() as stop, locked(run.folder / FORECAST, run.world, resumes=True):
            train_pilots(run, pilots, stop)
        return run.config, pilots


def train_pilots(run: Run, pilots: Sequence[Pilot], stop: StopSignals) -> None:
    """Train and measure every student of every pilot that is not done."""
    place = run.folder / FORECAST
    initial = place / "initial"
    run.save_initial(initial)
    run.release_student()
    facts = {"passes": most_passes(run), "parameters": run.parts.facts["student"]["parameters"]}
    together(lambda: write_text(place / FACTS, json.dumps(facts)), run.world, main_only=True)
    runner = TrialRunner(run.parts, initial, stop)
    for pilot in pilots:
        # What is measured before training is the same for all pilots, and kept beside them.
        shared = replace(pilot.config, output=place)
        variant = runner.for_parts(replace(run.parts, config=shared))
        together(partial(write_recipe, pilot), run.world, main_only=True)
        for trial in pilot.trials:
            if not decided(trial.scores.exists, run.world):
                run.run_trial(variant, trial, resume=True)
                gc.collect()  # models are in reference cycles, and the next trial needs memory
            together(trial.drop_weights, run.world, main_only=True)
    together(lambda: shutil.rmtree(initial, ignore_errors=True), run.world, main_only=True)


def write_recipe(pilot: Pilot) -> None:
    """Write a pilot's recipe, which a later call compares with its own."""
    pilot.config.output.mkdir(parents=True, exist_ok=True)
    write_text(pilot.config.output / "recipe.yaml", dump(pilot.config))


def require_same_recipe(pilots: Sequence[Pilot]) -> None:
    """Refuse pilots of an earlier call that were of another recipe."""
    for pilot in pilots:
        saved = pilot.config.output / "recipe.yaml"
        if saved.exists() and identity(read(saved)) != identity(pilot.config):
            raise ConfigError(
                f"Pilots in {saved.parent.parent} must be of this recipe, and {pilot.name} is of "
                "another. Add --overwrite to run them again, or choose another output."
            )


def identity(config: RunConfig) -> Mapping[str, Any]:
    """The options that change a pilot's student, or what is measured of it."""
    return lasting(config) | {"evaluate": to_plain(config)["evaluate"]}


def measured(pilots: Sequence[Pilot]) -> dict[str, Pilots]:
    """The runs of finished pilots, by kind of student: `distilled`, `cross_entropy`."""
    found = {}
    for place, first in enumerate(pilots[0].trials):
        runs, seconds, per_step = [], 0.0, 0.0
        for pilot in pilots:
            trial = pilot.trials[place]
            scores = read_scores(trial.scores).test
            assert scores is not None, "a forecast needs held-out text"
            last = last_step(lines(trial.folder / "metrics.jsonl"))
            runs.append(MeasuredRun(float(last["tokens"]), scores))
            seconds = last["seconds"] / last["tokens"]
            per_step = last["tokens"] / pilot.config.optim.num_steps
        found[first.name] = Pilots(tuple(runs), seconds, per_step)
    return found


def most_passes(run: Run) -> float:
    """How often a recipe reads its training text; of a mixture, the source read most often."""
    config, data = run.config, run.parts.data
    per_step = config.optim.rows_per_step(config.data.sequence_length)
    if config.rollout is not None:
        per_step -= rollout_rows(config, config.rollout)
    rows = config.optim.num_steps * per_step
    if not data.sources:
        return rows / data.num_rows
    return max(mixture_passes(data, rows).values())


def facts(config: RunConfig) -> dict[str, Any]:
    """How often a recipe reads its training text, and its student's parameters."""
    found: dict[str, Any] = json.loads((forecast_folder(config) / FACTS).read_text("utf-8"))
    return found


def alternative(config: RunConfig, changed: RunConfig, changes: Sequence[str]) -> Alternative:
    """The recipe that `changes` make of another, with a folder of its own for its pilots.

    Raises:
        ConfigError: Their students would not be measured in the same way.
    """
    first, second = (
        {
            "teacher": plain["teacher"],
            "evaluate": plain["evaluate"],
            "data.sequence_length": plain["data"]["sequence_length"],
        }
        for plain in (to_plain(config), to_plain(changed))
    )
    if first != second:
        which = " and ".join(key for key in first if first[key] != second[key])
        raise ConfigError(
            f"--against compares students by the same teacher on the same held-out rows, and its "
            f"changes are of {which}. Forecast that recipe by itself."
        )
    name = ", ".join(change for change in changes if not change.startswith("output="))
    output = changed.output
    if output == config.output:
        place = re.sub(r"[^\w.=]+", "-", name).strip("-")[:100]
        output = forecast_folder(config) / f"against-{place}"
    evaluate = replace(changed.evaluate, baseline=None)
    return Alternative(name, replace(changed, output=output, evaluate=evaluate))


def forecast_folder(config: RunConfig) -> Path:
    """Where a recipe's pilots and its forecast are."""
    return config.output / FORECAST
