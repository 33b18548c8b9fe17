"""The students a run trains: the distilled one, its cross-entropy anchor, each at every rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.config import ObjectiveConfig, RunConfig, to_plain
from limbeck.config.schedules import largest
from limbeck.distributed import (
    StopSignals,
    broadcast_object,
    checkpoint_name,
    full_weights,
    gathered,
    latest,
    load_checkpoint,
)
from limbeck.errors import DataError
from limbeck.evaluate.fidelity import Fidelity
from limbeck.evaluate.rollouts import rollout_figures
from limbeck.evaluate.scores import Scores
from limbeck.evaluate.suites import SuiteContext
from limbeck.experiment.parts import Parts
from limbeck.experiment.score_files import read_scores, write_scores
from limbeck.files import manifest
from limbeck.models import Distiller
from limbeck.rollouts import Rollouts
from limbeck.teachers import TeacherRequest
from limbeck.teachers.base import DISTRIBUTION
from limbeck.train import MetricSink, TrainSetup, train


@dataclass(frozen=True)
class Arm:
    """One student to train.

    Attributes:
        name: `distilled` or `cross_entropy`.
        learning_rate: Peak.
        objective: What it minimises.
        folder: Its run directory.
    """

    name: str
    learning_rate: float
    objective: ObjectiveConfig
    folder: Path

    @property
    def scores(self) -> Path:
        """Where its figures are kept once it is done."""
        return self.folder / "scores.json"

    @property
    def is_done(self) -> bool:
        """Whether its student is whole and measured.

        Raises:
            DataError: It was finished, and the student is gone with every checkpoint.
        """
        if not self.scores.exists():
            return False
        student = self.folder / "student"
        if manifest(student) is not None:
            return True
        checkpoints = self.folder / "checkpoints"
        if latest(checkpoints) is None:
            raise DataError(
                f"{self.folder} holds a finished run, but its student in {student} is "
                f"{'damaged' if student.exists() else 'missing'}, and {checkpoints} has no whole "
                "checkpoint to make it from. Restore one of them, or train again with --overwrite."
            )
        return False

    @property
    def writes(self) -> bool:
        """Whether it follows the recipe's `rollout`; the baseline trains on the text alone."""
        return self.name == "distilled"

    @property
    def selected_by(self) -> str:
        """The validation metric that chooses its learning rate and checkpoint: what it minimises.

        Choosing the cross-entropy baseline by its distance to the teacher would flatter
        distillation.
        """
        learns_from_text = largest(self.objective.alpha) == 0 and not self.objective.extra
        return "cross_entropy" if learns_from_text else "forward_kl"


def arms_of(config: RunConfig) -> list[Arm]:
    """Every student a recipe asks for; the distilled ones first."""
    rates: dict[str, float | tuple[float, ...]] = {"distilled": config.optim.learning_rate}
    objectives = {"distilled": config.objective}
    if config.evaluate.baseline:
        rates["cross_entropy"] = config.evaluate.baseline_learning_rate or rates["distilled"]
        objectives["cross_entropy"] = replace(config.objective, alpha=0.0, extra=(), positions=None)
    return [
        Arm(name, rate, objective, arm_folder(config.output, name, rate, len(grid)))
        for name, objective in objectives.items()
        for grid in [grid_of(rates[name])]
        for rate in grid
    ]


def grid_of(rates: float | tuple[float, ...]) -> tuple[float, ...]:
    """One learning rate or several, as several."""
    return rates if isinstance(rates, tuple) else (rates,)


def arm_folder(output: Path, name: str, rate: float, grid_size: int) -> Path:
    """The run directory of an arm: the run's own for the only distilled one."""
    if grid_size > 1:
        return output / "stages" / f"{name}-{rate:g}"
    return output if name == "distilled" else output / "stages" / name


def best(arms: Sequence[Arm], metric: str | None = None) -> dict[str, Arm]:
    """Of each name the trial with the lowest value on the validation documents.

    Args:
        arms: All trials, finished.
        metric: Which value; by default the one that a trial minimises.
    """
    chosen: dict[str, Arm] = {}
    for arm in arms:
        by = metric or arm.selected_by
        if arm.name not in chosen or validation(arm, by) < validation(chosen[arm.name], by):
            chosen[arm.name] = arm
    return chosen


def validation(arm: Arm, metric: str) -> float:
    """A finished trial's value on the validation documents; infinite without held-out text."""
    figures, _ = read_scores(arm.scores)
    return math.inf if figures is None else figures.mean(metric)


class Bench:
    """Where arms are trained and measured, one after another, on the same parts."""

    def __init__(self, parts: Parts, initial: Path, stop: StopSignals) -> None:
        """
        Args:
            parts: Of the run.
            initial: Where the student as initialised is saved, when a second arm needs it.
            stop: Signals that training heeds.
        """
        self._parts = parts
        self._initial = initial
        self._stop = stop
        self._fidelity = fidelity_of(parts)
        self._latest: Scores | None = None

    def run(self, arm: Arm, sinks: Sequence[MetricSink], *, resume: bool) -> None:
        """Train an arm, keep its best student, and write down its figures."""
        parts = self._parts
        distiller = parts.distiller(parts.take_student(self._initial), arm.objective)
        first = parts.config.output / "initial.json"
        # Rank 0 looks for all: measuring needs every rank, and disks may show a file to some first.
        if not broadcast_object(first.exists(), parts.world):
            self._write_scores(first, distiller)
        parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
        self._latest = None
        rollouts = parts.rollouts(distiller, arm.folder) if arm.writes else None
        result = train(
            TrainSetup(
                distiller=distiller,
                teacher=parts.teacher,
                source=parts.source(rollouts),
                optim=parts.config.optim,
                learning_rate=arm.learning_rate,
                checkpoint=parts.config.checkpoint,
                memory=parts.config.memory,
                world=parts.world,
                folder=arm.folder,
                sequence_length=parts.config.data.sequence_length,
                dropout_seed=parts.config.seed,
                evaluate=self._evaluator(distiller, rollouts),
                selected_by=arm.selected_by,
                evaluate_every=parts.config.evaluate.every,
                sinks=sinks,
                resume=resume,
                fingerprint=fingerprint(parts, arm),
                stop=self._stop,
            )
        )
        if result.best_step != result.step:
            checkpoint = arm.folder / "checkpoints" / checkpoint_name(result.best_step)
            load_checkpoint(checkpoint, distiller, (), parts.world)
            self._latest = None
        self._save(arm, distiller)
        self._write_scores(arm.scores, distiller, self._latest)

    def _save(self, arm: Arm, distiller: Distiller) -> None:
        weights = full_weights(distiller.student.hf_model, self._parts.world)
        if self._parts.world.is_main:
            self._parts.publish_student(distiller.student, arm.folder / "student", weights)

    def _write_scores(
        self, path: Path, distiller: Distiller, deciding: Scores | None = None
    ) -> None:
        """Write a student's figures down; those that decide are measured unless they are given."""
        reporting = None
        if self._fidelity is not None:
            with gathered(distiller):
                if deciding is None:
                    deciding = self._fidelity.validation(distiller.student)
                reporting = self._fidelity.test(distiller.student)
        if self._parts.world.is_main:
            write_scores(path, deciding, reporting)

    def _evaluator(
        self, distiller: Distiller, rollouts: Rollouts | None
    ) -> Callable[[], Mapping[str, float]] | None:
        """What the loop calls to measure; None without held-out text."""
        fidelity, parts = self._fidelity, self._parts
        if fidelity is None:
            return None

        def evaluate() -> Mapping[str, float]:
            scores = self._latest = fidelity.validation(distiller.student)
            measured = {name: scores.mean(name) for name in scores.metrics}
            if rollouts is None:
                return measured
            reader = parts.teacher.with_needs(DISTRIBUTION)
            budget = parts.config.memory.head_budget_mb
            return measured | rollout_figures(
                distiller.student, reader, rollouts.latest, parts.world, budget
            )

        return evaluate


def suite_context(parts: Parts) -> SuiteContext | None:
    """What students of a run are measured with; None without held-out text."""
    if parts.held_out is None:
        return None
    budget = parts.config.memory.head_budget_mb
    return SuiteContext(parts.teacher, parts.tokenizer, parts.held_out, parts.world, budget)


def fidelity_of(parts: Parts) -> Fidelity | None:
    """The run's fidelity suite; None without held-out text."""
    context = suite_context(parts)
    return None if context is None else Fidelity(context)


def fingerprint(parts: Parts, arm: Arm) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    told = {
        "recipe": lasting(parts.config),
        "arm": arm.name,
        "learning_rate": arm.learning_rate,
        "teacher": parts.teacher.info.to_json(),
        "data": parts.data.facts,
    }
    frozen = parts.facts["trained"].get("frozen_sha256")
    return told if frozen is None else told | {"frozen_sha256": frozen}


def lasting(config: RunConfig) -> dict[str, Any]:
    """What of a recipe must not change between a run and its resumption."""
    plain = to_plain(config)
    transient = ("output", "track", "device", "parallel", "evaluate", "memory", "checkpoint")
    for section in (*transient, "plugins"):
        del plain[section]
    return plain
