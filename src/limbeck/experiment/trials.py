"""The students that a run trains: distilled and cross-entropy baseline, at each learning rate."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.config import ObjectiveConfig, OptimConfig, RunConfig, to_plain
from limbeck.config.schedules import largest, value_at
from limbeck.distributed import (
    StopSignals,
    checkpoint_name,
    decided,
    full_weights,
    gathered,
    latest,
    load_checkpoint,
    together,
)
from limbeck.errors import DataError
from limbeck.evaluate.fidelity import Fidelity
from limbeck.evaluate.rollouts import cold_start_note, rollout_figures
from limbeck.evaluate.scores import Scores
from limbeck.evaluate.suites import SuiteContext
from limbeck.experiment.controls import equal_time_steps
from limbeck.experiment.parts import Parts
from limbeck.experiment.score_files import TrialScores, read_scores, write_scores
from limbeck.files import manifest, sha256
from limbeck.models import Distiller, choose_dtype, round_weights
from limbeck.registry import type_of
from limbeck.rollouts import Rollout, Rollouts
from limbeck.teachers import TeacherRequest, find_local
from limbeck.teachers.base import DISTRIBUTION
from limbeck.teachers.served import REACHED_BY
from limbeck.teachers.shuffled import ShuffledTeacher
from limbeck.train import MetricSink, TrainSetup, train

BASELINES = ("cross_entropy", "equal_time")
"""Trials that learn from the text alone."""

FORECAST = "forecast"
"""Folder of a recipe's pilots in its output."""


@dataclass(frozen=True)
class Trial:
    """One student to train.

    Attributes:
        name: `distilled`, `cross_entropy`, or a control.
    """

    name: str
    learning_rate: float
    objective: ObjectiveConfig
    folder: Path

    @property
    def scores(self) -> Path:
        """File with its metrics, written when it is finished."""
        return self.folder / "scores.json"

    @property
    def checkpoints(self) -> Path:
        """Directory of its checkpoints."""
        return self.folder / "checkpoints"

    def drop_weights(self) -> None:
        """Delete its student and checkpoints; its scores and metrics stay."""
        for name in ("student", "checkpoints"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @property
    def is_done(self) -> bool:
        """Whether its student is intact and measured."""
        if not self.scores.exists():
            return False
        student = self.folder / "student"
        if manifest(student) is not None:
            return True
        if latest(self.checkpoints) is None:
            raise DataError(
                f"{self.folder} holds a finished run, but its student in {student} is "
                f"{'damaged' if student.exists() else 'missing'}, and {self.checkpoints} has no "
                "whole checkpoint to make it from. Restore one of them, or train again with "
                "--overwrite."
            )
        return False

    @property
    def writes(self) -> bool:
        """Whether it follows the recipe's `rollout`; baselines train on the text alone."""
        return self.name not in BASELINES

    @property
    def selected_by(self) -> str:
        """The validation metric that chooses its learning rate and checkpoint: what it minimises.

        Choosing the cross-entropy baseline by its distance to the teacher would flatter
        distillation.
        """
        objective = self.objective
        learns_from_text = largest(objective.divergence_weight) == 0 and not objective.extra
        return "cross_entropy" if learns_from_text else "forward_kl"


def trials_of(config: RunConfig) -> list[Trial]:
    """All trials of a recipe; the distilled ones first."""
    rates: dict[str, float | tuple[float, ...]] = {"distilled": config.optim.learning_rate}
    objectives = {"distilled": config.objective}
    if config.evaluate.baseline:
        rates["cross_entropy"] = config.evaluate.baseline_learning_rate or rates["distilled"]
        objectives["cross_entropy"] = replace(config.objective, alpha=0.0, extra=(), positions=None)
    for control in config.evaluate.controls:
        like = "cross_entropy" if control in BASELINES else "distilled"
        rates[control], objectives[control] = rates[like], objectives[like]
        if control == "without_extra":
            objectives[control] = replace(objectives[like], extra=())
    return [
        Trial(name, rate, objective, trial_folder(config.output, name, rate, len(grid)))
        for name, objective in objectives.items()
        for grid in [grid_of(rates[name])]
        for rate in grid
    ]


def grid_of(rates: float | tuple[float, ...]) -> tuple[float, ...]:
    """The learning rates as a tuple."""
    return rates if isinstance(rates, tuple) else (rates,)


def trial_folder(output: Path, name: str, rate: float, grid_size: int) -> Path:
    """The run directory of a trial: the run's own if there is one distilled trial."""
    if grid_size > 1:
        return output / "stages" / f"{name}-{rate:g}"
    return output if name == "distilled" else output / "stages" / name


def best(trials: Sequence[Trial], metric: str | None = None) -> dict[str, Trial]:
    """For each name, the trial with the lowest value on the validation documents.

    Args:
        metric: The metric to compare; by default the one that a trial minimises.
    """
    chosen: dict[str, Trial] = {}
    for trial in trials:
        by = metric or trial.selected_by
        if trial.name not in chosen or validation(trial, by) < validation(chosen[trial.name], by):
            chosen[trial.name] = trial
    return chosen


def validation(trial: Trial, metric: str) -> float:
    """A finished trial's metric on the validation documents; infinite if it is not known."""
    figures = read_scores(trial.scores).validation
    value = math.nan if figures is None else figures.mean(metric)
    return math.inf if math.isnan(value) else value


def in_force(parts: Parts, trial: Trial, step: int) -> dict[str, float]:
    """Alpha and temperature of a step, and the passes over the text up to its end.

    Mixtures and runs on generated text have no passes in common.
    """
    objective, config = trial.objective, parts.config
    found = {
        "alpha": value_at(objective.alpha, step),
        "temperature": value_at(objective.temperature, step),
    }
    if not config.data.mix and config.rollout is None:
        rows = config.optim.rows_per_step(config.data.sequence_length)
        found["epoch"] = (step + 1) * rows / parts.data.num_rows
    return found


class TrialRunner:
    """Trains and measures trials one after another, with the same teacher and data."""

    def __init__(self, parts: Parts, initial: Path, stop: StopSignals) -> None:
        """
        Args:
            initial: Folder of the initial student, for trials after the first.
        """
        self._parts = parts
        self._initial = initial
        self._stop = stop
        self._fidelity, self._others = fidelities(parts)
        self._latest: Scores | None = None

    def for_parts(self, parts: Parts) -> TrialRunner:
        """A runner of a variant of the run, which keeps what the teacher said of held-out text."""
        runner = copy(self)
        runner._parts = parts
        return runner

    def open(self, trial: Trial) -> Distiller:
        """The student of a trial as it was initialised, sharded."""
        return self._parts.distiller(self._parts.take_student(self._initial), trial.objective)

    def run(
        self, trial: Trial, distiller: Distiller, sinks: Sequence[MetricSink], *, resume: bool
    ) -> None:
        """Train an opened trial, save its best student, and write its metrics."""
        parts, self._latest = self._parts, None
        first = parts.config.output / "initial.json"
        # Rank 0 decides: a shared disk may show a file to some ranks first, and all must measure.
        if not decided(first.exists, parts.world):
            self._write_scores(first, distiller)
        parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
        takes_time = trial.name == "equal_time"
        optim = self._as_long(trial) if takes_time else parts.config.optim
        teacher = ShuffledTeacher(parts.teacher) if trial.name == "shuffled" else parts.teacher
        rollouts = parts.rollouts(distiller, trial.folder) if trial.writes else None
        result = train(
            TrainSetup(
                distiller=distiller,
                teacher=teacher,
                source=parts.source(rollouts),
                optim=optim,
                learning_rate=trial.learning_rate,
                checkpoint=parts.config.checkpoint,
                memory=parts.config.memory,
                world=parts.world,
                folder=trial.folder,
                sequence_length=parts.config.data.sequence_length,
                dropout_seed=parts.config.seed,
                evaluate=self._evaluator(distiller, rollouts),
                selected_by=trial.selected_by,
                evaluate_every=parts.config.evaluate.every,
                patience=None if takes_time else parts.config.evaluate.patience,
                sinks=sinks,
                resume=resume,
                fingerprint=fingerprint(parts, trial),
                stop=self._stop,
                in_force=partial(in_force, parts, trial),
                opening=self._opening(distiller, rollouts),
            )
        )
        if result.best_step != result.step:
            checkpoint = trial.checkpoints / checkpoint_name(result.best_step)
            load_checkpoint(checkpoint, distiller, (), parts.world)
            self._latest = None
        if parts.student_dtype is not None:
            round_weights(distiller.student, parts.student_dtype)
            self._latest = None
        self._save(trial, distiller)
        self._write_scores(trial.scores, distiller, self._latest)

    def _as_long(self, trial: Trial) -> OptimConfig:
        """The optimizer's options for as much time as the distilled student's steps took."""
        config = self._parts.config

        def find() -> int:
            done = best([each for each in trials_of(config) if each.name != trial.name])
            distilled, baseline = done["distilled"].folder, done["cross_entropy"].folder
            recipe_steps = config.optim.num_steps
            return equal_time_steps(trial.folder, distilled, baseline, recipe_steps)

        return config.optim.rescaled(decided(find, self._parts.world))

    def _save(self, trial: Trial, distiller: Distiller) -> None:
        weights = full_weights(distiller.student.hf_model, self._parts.world)
        folder, parts = trial.folder / "student", self._parts
        together(
            lambda: parts.publish_student(distiller.student, folder, weights, parts.student_dtype),
            parts.world,
            main_only=True,
        )

    def _write_scores(
        self, path: Path, distiller: Distiller, validation_scores: Scores | None = None
    ) -> None:
        """Write a student's metrics; those on validation documents are measured unless given."""
        test_scores, others = None, {}
        if self._fidelity is not None:
            with gathered(distiller):
                if validation_scores is None:
                    validation_scores = self._fidelity.validation(distiller.student)
                test_scores = self._fidelity.test(distiller.student)
                others = {n: each.test(distiller.student) for n, each in self._others.items()}
        scores = TrialScores(validation_scores, test_scores, others)
        together(lambda: write_scores(path, scores), self._parts.world, main_only=True)

    def _evaluator(
        self, distiller: Distiller, rollouts: Rollouts | None
    ) -> Callable[[], Mapping[str, float]] | None:
        """The evaluation that the training loop calls; None without held-out text."""
        fidelity = self._fidelity
        if fidelity is None:
            return None

        def evaluate() -> Mapping[str, float]:
            scores = self._latest = fidelity.validation(distiller.student)
            measured = {name: scores.mean(name) for name in scores.metrics}
            for text, other in self._others.items():
                found = other.validation(distiller.student)
                measured |= {f"{text}/{name}": found.mean(name) for name in found.metrics}
            if rollouts is None:
                return measured
            return measured | self._rollout_figures(distiller, rollouts.latest)

        return evaluate

    def _rollout_figures(
        self, distiller: Distiller, rollouts: Sequence[Rollout]
    ) -> dict[str, float]:
        parts = self._parts
        # Distributions from a head are whole, and hold the likelihoods. A local teacher's is not
        # read: it may be sharded here.
        has_head = find_local(parts.teacher) is not None or parts.teacher.head is not None
        likelihoods = parts.teacher.gives_likelihoods and not has_head
        needs = replace(DISTRIBUTION, likelihoods=likelihoods)
        reader, budget = parts.teacher.with_needs(needs), parts.config.memory.head_budget_mb
        return rollout_figures(distiller.student, reader, rollouts, parts.world, budget)

    def _opening(self, distiller: Distiller, rollouts: Rollouts | None) -> Callable[[], str] | None:
        """Tells how likely the teacher finds the student's first texts; None without such texts."""
        parts, rollout = self._parts, self._parts.config.rollout
        if rollout is None or rollouts is None or rollout.writer == "teacher":
            return None

        def opening() -> str:
            figures = self._rollout_figures(distiller, rollouts.latest)
            initial = parts.config.output / "initial.json"
            scores = read_scores(initial).test if parts.world.is_main else None
            name = "teacher_cross_entropy"
            if scores is None or name not in scores.metrics:
                return cold_start_note(figures, None)
            return cold_start_note(figures, scores.mean(name))

        return opening


def suite_context(parts: Parts) -> SuiteContext | None:
    """The context of evaluation suites; None without held-out text."""
    if parts.held_out is None:
        return None
    budget = parts.config.memory.head_budget_mb
    return SuiteContext(parts.teacher, parts.tokenizer, parts.held_out, parts.world, budget)


def fidelities(parts: Parts) -> tuple[Fidelity | None, dict[str, Fidelity]]:
    """Fidelity on the held-out text that chooses, and on each other; None without any."""
    context = suite_context(parts)
    if context is None:
        return None, {}
    others = list(parts.held_out_sets.items())[1:]
    return Fidelity(context), {n: Fidelity(replace(context, held_out=each)) for n, each in others}


def fingerprint(parts: Parts, trial: Trial) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    computed_in = choose_dtype(parts.config.parallel.compute_dtype, parts.world.device)
    facts = {
        "recipe": lasting(parts.config),
        "trial": trial.name,
        "learning_rate": trial.learning_rate,
        "teacher": parts.teacher.info.to_json(),
        "data": parts.data.facts,
        "compute_dtype": str(computed_in).removeprefix("torch."),
        "plugins": [sha256(path) for path in parts.config.plugins],
    }
    if (reduce_dtype := parts.config.parallel.reduce_dtype) != "float32":
        facts["reduce_dtype"] = reduce_dtype
    frozen = parts.facts["trained"].get("frozen_sha256")
    return facts if frozen is None else facts | {"frozen_sha256": frozen}


def lasting(config: RunConfig) -> dict[str, Any]:
    """The options that must not change between a run and its resumption.

    Of `parallel` and `plugins` only what changes numbers counts; see `fingerprint`.
    """
    plain = to_plain(config)
    transient = ("output", "track", "device", "parallel", "evaluate", "memory", "checkpoint")
    for section in (*transient, "plugins", "write", "export"):
        del plain[section]
    if type_of(config.teacher) == "served":
        teacher = {k: v for k, v in plain["teacher"].items() if k not in REACHED_BY}
        if teacher.get("states") is not None:
            teacher["states"] = True  # a folder may be mounted elsewhere
        plain["teacher"] = teacher
    if plain["rollout"] is not None:
        plain["rollout"] = {k: v for k, v in plain["rollout"].items() if k != "server"}
    return plain
