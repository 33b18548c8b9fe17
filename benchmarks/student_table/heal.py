"""One cell: open a shape, train it from the store and measure it, with limbeck's own code."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.config import RunConfig
from limbeck.data import corpus_path
from limbeck.data.source import ShuffledRows
from limbeck.distributed import World
from limbeck.evaluate.fidelity import Fidelity
from limbeck.evaluate.scores import Scores
from limbeck.evaluate.suites import SuiteContext
from limbeck.experiment import load
from limbeck.experiment.parts import STUDENT_DTYPE, Parts, prove_pair, request_of, shapes_of
from limbeck.models import Distiller
from limbeck.store import Store
from limbeck.students import Origin, initialisers
from limbeck.teachers import TeacherRequest
from limbeck.teachers.stored import StoredTeacher
from limbeck.train import make_optimizers, make_schedule, train_step
from limbeck.train.optimizers import set_rate
from student_table.plan import BEFORE, OTHER_RATE, RATES, ROW, STEP, Cell
from student_table.record import DECIDING, Texts
from student_table.shapes import shape_folder


@dataclass(frozen=True)
class Bench:
    """What all cells share.

    Attributes:
        told: The command line.
        texts: What is read.
        store: What the teacher said of it.
        world: This process.
    """

    told: argparse.Namespace
    texts: Texts
    store: Store
    world: World

    @property
    def steps(self) -> int:
        """Optimizer steps of a cell."""
        return steps_of(self.told)


def steps_of(told: argparse.Namespace) -> int:
    """Optimizer steps of a cell."""
    return max(int(told.tokens) // STEP, 2)


def measure(bench: Bench, cell: Cell, overrides: str) -> dict[str, Any]:
    """A cell's figures; of several learning rates those of the best on the rows that decide."""
    began = time.perf_counter()
    rates = rates_of(bench.told, cell)
    found = [(heal(bench, cell, overrides, rate, len(rates) > 1), rate) for rate in rates]
    best, rate = min(found, key=lambda pair: pair[0].deciding)
    return {
        "shape": cell.shape,
        "arm": cell.arm,
        "seed": cell.seed,
        "parameters": best.parameters,
        "layers": best.layers,
        "steps": 0 if cell.arm == BEFORE else bench.steps,
        "learning_rate": rate,
        "objective": {} if cell.arm == BEFORE else best.objective,
        "training_seconds": best.seconds,
        "seconds": time.perf_counter() - began,
        "scores": best.scores,
    }


def rates_of(told: argparse.Namespace, cell: Cell) -> list[float]:
    """Learning rates to try."""
    if cell.arm == BEFORE:
        return [0.0]
    if told.rates:
        return [float(rate) for rate in told.rates.split(",")]
    return [RATES.get(cell.arm, OTHER_RATE)]


@dataclass(frozen=True)
class Healed:
    """A student after its last step.

    Attributes:
        parameters: How many.
        layers: How many.
        seconds: In optimizer steps.
        deciding: Forward KL on the rows that choose a rate; 0 where there is nothing to choose.
        scores: On the rows that report.
        objective: What was minimised.
    """

    parameters: int
    layers: int
    seconds: float
    deciding: float
    scores: Scores
    objective: Mapping[str, Any]


def heal(bench: Bench, cell: Cell, overrides: str, rate: float, decide: bool) -> Healed:
    """Train a shape as `limbeck distill` would, but write no checkpoint, student or report."""
    parts = parts_of(bench, cell, recipe(bench, cell, overrides, rate or OTHER_RATE))
    budget = parts.config.memory.head_budget_mb
    held_out = bench.texts.held_out
    judge = Fidelity(SuiteContext(parts.teacher, parts.tokenizer, held_out, bench.world, budget))
    model = parts.take_student(bench.told.work)
    seconds = 0.0
    if cell.arm != BEFORE:
        distiller = parts.distiller(model, parts.config.objective)
        parts.teacher.require(TeacherRequest(needs=distiller.objective.needs))
        seconds = take_steps(parts, distiller, rate, bench.steps)
    deciding = judge.validation(model).mean("forward_kl") if decide else 0.0
    scores = judge.test(model)
    objective = {"alpha": parts.config.objective.alpha, "extra": parts.config.objective.extra}
    return Healed(model.num_parameters, model.num_layers, seconds, deciding, scores, objective)


def take_steps(parts: Parts, distiller: Distiller, rate: float, steps: int) -> float:
    """Every optimizer step of a cell, as the training loop takes them; returns their seconds."""
    optim, world = parts.config.optim, parts.world
    optimizers = make_optimizers(distiller, optim, rate, world.device)
    schedule = make_schedule(optim, rate)
    source = ShuffledRows(parts.data, seed=parts.config.seed, rows_per_step=STEP // ROW)
    distiller.train()
    began = time.perf_counter()
    for step in range(steps):
        set_rate(optimizers, schedule(step))
        distiller.objective.set_step(step)
        outcome = train_step(
            distiller,
            parts.teacher,
            optimizers,
            source.step(step, world).cut(STEP // ROW),
            world,
            max_grad_norm=optim.max_grad_norm,
        )
        assert outcome.is_finite, f"step {step} of {parts.config.student} is not finite"
        distiller.objective.update(outcome.shares)
    distiller.eval()
    return time.perf_counter() - began


def parts_of(bench: Bench, cell: Cell, config: RunConfig) -> Parts:
    """What `limbeck.experiment.parts` gathers, from texts and a store that are open already."""
    teacher = StoredTeacher(bench.store, bench.world.device)
    texts = bench.texts
    student = initialisers.bind(config.student, "student")(
        Origin(
            None,
            texts.tokenizer,
            replace(bench.world, mesh=None),
            STUDENT_DTYPE,
            recorded=teacher.info.to_json(),
        )
    )
    vocabulary = prove_pair(student, teacher)
    shapes = shapes_of(student, teacher)
    data = texts.some(cell.seed, bench.steps)
    teacher.require(request_of(config, shapes, vocabulary, data, {"": texts.held_out}))
    return Parts(
        config, bench.world, texts.tokenizer, vocabulary, teacher, student, shapes, data,
        {"": texts.held_out}, {},
    )  # fmt: skip


def recipe(bench: Bench, cell: Cell, overrides: str, rate: float) -> RunConfig:
    """A cell as the recipe that `limbeck distill` would read."""
    told = bench.told
    plain: Mapping[str, Any] = {
        "teacher": {"type": "stored", "path": str(bench.store.path)},
        "student": {"type": "pretrained", "path": str(shape_folder(told, cell.shape))},
        "data": {"type": "text", "path": str(corpus_path("train")), "sequence_length": ROW},
        "objective": {"temperature": 1.0, "divergence": "forward_kl"},
        "optim": {
            "learning_rate": rate,
            "steps": bench.steps,
            "tokens_per_step": STEP,
            "warmup_steps": min(5, bench.steps - 1),
        },
        "evaluate": {
            "data": str(corpus_path("heldout")),
            "max_tokens": told.held_out,
            "max_tokens_during": DECIDING,
        },
        "memory": {"micro_batch": STEP // ROW},
        "output": str(told.work / "run"),
        "seed": cell.seed,
    }
    path: Path = told.work / "recipe.yaml"
    path.write_text(json.dumps(plain))  # JSON is YAML
    return load(path, split(overrides))


def split(overrides: str) -> Iterator[str]:
    """`a=1 b=[{x: 1, y: 2}]` into its parts, at spaces before a name and an equals sign."""
    part = ""
    for word in overrides.split(" "):
        if part and "=" in word:
            yield part
            part = word
        else:
            part = f"{part} {word}".strip()
    if part:
        yield part
