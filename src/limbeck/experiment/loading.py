"""Reading a recipe, with every check that needs no model and no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.config import OptimConfig, RecordConfig, RunConfig, read
from limbeck.config.json_schema import recipe_schema
from limbeck.config.recipe import ParallelConfig
from limbeck.config.trainable import trainable_problems
from limbeck.data import data_problems, readers, sources
from limbeck.evaluate.suites import suites
from limbeck.experiment.batches import rollout_problems
from limbeck.experiment.held_out_sets import set_problems
from limbeck.experiment.text import warmup_problems
from limbeck.export import exporters
from limbeck.losses import objective_problems, terms
from limbeck.losses.divergences import divergences
from limbeck.losses.positions import positions
from limbeck.registry import Component, Problem, Registry, type_of
from limbeck.store import forms
from limbeck.students import initialisers
from limbeck.students.depth import ways_problem
from limbeck.students.width import sizes_problem
from limbeck.teachers import teachers
from limbeck.train.schedule import schedule_problems
from limbeck.train.trackers import trackers
from limbeck.writing import filters, write_problems

OPEN_PARTS: dict[str, Registry[Any]] = {
    "teacher": teachers,
    "student": initialisers,
    "objective.divergence": divergences,
    "objective.extra[]": terms,
    "objective.positions": positions,
    "data.source": sources,
    "evaluate.suites[]": suites,
    "record.form": forms,
    "write.filters[]": filters,
    "export[]": exporters,
    "track[]": trackers,
}
"""Options whose value is a registered component, with its registry."""

CUT = ("depth", "width")
"""Students that are cut from a model."""


def load(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply `a.b=value` overrides, and check it.

    Raises:
        ConfigError: One line for each mistake, starting with the path of the option.
    """
    return read(Path(path), overrides, problems)


def problems(sections: Mapping[str, Any], config: RunConfig | None) -> Iterator[Problem]:
    """Mistakes in component options, and contradictions between options.

    Args:
        sections: Those that are right outside components.
        config: None if one is not; contradictions between sections are then left out.
    """
    for name, own_problems in SECTION_PROBLEMS.items():
        if sections.get(name) is not None:
            yield from own_problems(sections[name])
    if config is not None:
        yield from contradictions(config)


def contradictions(config: RunConfig) -> Iterator[Problem]:
    """Contradictions between sections."""
    yield from shared_problems(config)
    yield from quantized_problems(config)
    yield from step_problems(config)
    yield from rollout_problems(config)
    yield from trial_problems(config)
    yield from set_problems(config)
    yield from write_problems(config)
    if config.checkpoint.student_dtype != "float32":
        yield from narrow_problems(config)


def student_problems(student: Component) -> Iterator[Problem]:
    """Problems with a student's options, and with its size if it is pruned from its teacher."""
    yield from initialisers.problems(student, "student")
    if type_of(student) == "depth":
        ways = {way: student.get(way) for way in ("layers", "keep", "fraction", "params", "drop")}
        problem = ways_problem(by=student.get("by"), **ways)
        yield from [Problem("student", problem)] if problem else []
    if type_of(student) == "width":
        names = ("intermediate", "heads", "kv_heads", "hidden", "keep", "params")
        problem = sizes_problem(**{name: student.get(name) for name in names})
        yield from [Problem("student", problem)] if problem else []


def optim_problems(optim: OptimConfig) -> Iterator[Problem]:
    """Problems with the schedule and the length of the run."""
    yield from schedule_problems(optim)
    if (optim.steps is None) == (optim.epochs is None):
        has = "neither" if optim.steps is None else f"steps: {optim.steps}, epochs: {optim.epochs}"
        yield Problem("optim.steps", f"must be given, or optim.epochs in its place, got {has}.")
    if optim.steps is not None:
        yield from warmup_problems(optim)


def narrow_problems(config: RunConfig) -> Iterator[Problem]:
    """Parts of a student that a narrower format would change."""
    found = config.checkpoint.student_dtype
    if config.trainable.lora is not None:
        yield Problem(
            "checkpoint.student_dtype",
            "must be float32 with trainable.lora, whose small changes would be rounded away when "
            f"they are merged, got {found}. Convert the student afterwards if it has to be "
            "narrower.",
        )
    if config.trainable.quantize is not None:
        yield Problem(
            "checkpoint.student_dtype",
            "must be float32 with trainable.quantize, whose rounded weights have more digits "
            f"than a narrower format, got {found}. limbeck export makes the student small.",
        )


def shared_problems(config: RunConfig) -> Iterator[Problem]:
    """A student that shares its teacher's weights must not change them."""
    if type_of(config.student) != "shared":
        return
    lora = config.trainable.lora
    if lora is None:
        yield Problem(
            "student.type",
            "a shared student has the teacher's own weights, which stay as they are: it needs "
            "trainable.lora, and there is none. Set trainable.lora={}, or use type: copy.",
        )
    elif lora.quantize is not None:
        yield Problem(
            "trainable.lora.quantize",
            "a shared student's frozen weights are its teacher's, which would be quantised too, "
            f"got {lora.quantize}. Use student.type: copy, or leave quantize out.",
        )
    if config.parallel.compute_dtype != "auto":
        yield Problem(
            "parallel.compute_dtype",
            "must be auto for a shared student, which computes in its teacher's dtype, got "
            f"{config.parallel.compute_dtype}. Set teacher.dtype instead, or use type: copy.",
        )
    if config.parallel.teacher == "offload":
        yield Problem(
            "parallel.teacher",
            "must be shard or replicate for a shared student, whose weights are the teacher's, got "
            "offload. Remove it, or use type: copy.",
        )


def quantized_problems(config: RunConfig) -> Iterator[Problem]:
    """What cannot be done with a teacher whose weights are quantised."""
    if config.teacher.get("quantize") is None:
        return
    kind = type_of(config.student)
    if kind in ("copy", "shared") or (kind in CUT and config.student.get("path") is None):
        yield Problem(
            "teacher.quantize",
            f"a {kind} student is made from the teacher's weights, which must not be quantised "
            "then. Make the student once with limbeck shrink, and name its folder: {type: "
            "pretrained, path: ...}.",
        )
    if config.parallel.teacher == "offload":
        yield Problem(
            "parallel.teacher",
            "must not be offload with teacher.quantize: a quantised teacher is whole on each "
            "rank's device. Remove one of the two.",
        )


def parallel_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    """Two numbers of copies that contradict each other."""
    if parallel.shard == "none" and parallel.replicate > 1:
        yield Problem(
            "parallel.replicate",
            "must be 1 with parallel.shard=none, which keeps a copy on each rank, got "
            f"{parallel.replicate}. Remove one of the two.",
        )


def trial_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems with the baseline and with grids of learning rates, which need held-out text."""
    held_out, grid = config.evaluate, config.optim.learning_rate
    both = "compares two students on held-out text"
    needs_text: dict[str, tuple[object, str]] = {
        "evaluate.baseline": (held_out.baseline, both),
        "evaluate.controls": (held_out.controls, both),
        "evaluate.seeds": (held_out.seeds > 1, "compares students on held-out text"),
        "evaluate.patience": (
            held_out.patience,
            "ends training by what is measured on held-out text",
        ),
        "optim.learning_rate": (isinstance(grid, tuple), "a grid is compared on held-out text"),
    }
    for at, (is_set, why) in needs_text.items():
        if is_set and not held_out.data:
            yield Problem(at, f"{why}, and evaluate.data is not set.")
    if "equal_time" in held_out.controls:
        if not held_out.baseline:
            yield Problem(
                "evaluate.controls",
                "equal_time is timed by the baseline, and evaluate.baseline is not set. Set it to "
                "cross_entropy.",
            )
        elif isinstance(held_out.baseline_learning_rate or grid, tuple):
            yield Problem(
                "evaluate.controls",
                "equal_time trains at the baseline's learning rate, and it has a grid. Set "
                "evaluate.baseline_learning_rate to one rate.",
            )
    if "without_extra" in held_out.controls and not config.objective.extra:
        yield Problem(
            "evaluate.controls",
            "without_extra trains without objective.extra, and that is empty. Leave it out.",
        )
    one_row = config.optim.rows_per_step(config.data.sequence_length) == 1
    if "shuffled" in held_out.controls and one_row:
        yield Problem(
            "evaluate.controls",
            "shuffled exchanges rows within a step, and a step has 1 row (optim.tokens_per_step / "
            "data.sequence_length). Raise optim.tokens_per_step.",
        )
    if held_out.baseline_learning_rate is not None and not held_out.baseline:
        yield Problem(
            "evaluate.baseline_learning_rate",
            "needs a baseline, and evaluate.baseline is not set. Set it to cross_entropy.",
        )
    for at, rates in (
        ("optim.learning_rate", grid),
        ("evaluate.baseline_learning_rate", held_out.baseline_learning_rate),
    ):
        names = [f"{rate:g}" for rate in rates] if isinstance(rates, tuple) else []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield Problem(at, f"must name each rate once, got {', '.join(twice)} twice.")


def step_problems(config: RunConfig) -> Iterator[Problem]:
    """A step that is smaller than a row."""
    tokens, length = config.optim.tokens_per_step, config.data.sequence_length
    if tokens < length:
        yield Problem(
            "optim.tokens_per_step",
            f"must hold at least one row of data.sequence_length = {length}, got {tokens}.",
        )


def record_problems(record: RecordConfig) -> Iterator[Problem]:
    """Problems with the form and the layers of a recording."""
    yield from forms.problems(record.form, "record.form")
    layers = list(record.layers)
    if layers != sorted(set(layers)):
        yield Problem("record.layers", f"must name each layer once and in order, got {layers}.")


SECTION_PROBLEMS: Mapping[str, Callable[[Any], Iterable[Problem]]] = {
    "teacher": partial(teachers.problems, at="teacher"),
    "student": student_problems,
    "objective": objective_problems,
    "trainable": trainable_problems,
    "data": data_problems,
    "optim": optim_problems,
    "evaluate": lambda evaluate: suites.list_problems(evaluate.suites, "evaluate.suites"),
    "parallel": parallel_problems,
    "record": record_problems,
    "write": lambda write: filters.list_problems(write.filters, "write.filters"),
    "export": partial(exporters.list_problems, at="export"),
    "track": partial(trackers.list_problems, at="track"),
}
"""Mistakes in each section alone."""


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    whole = recipe_schema(OPEN_PARTS)
    whole["$defs"]["DataConfig"]["properties"]["type"]["enum"] = ["auto", *readers.names()]
    whole["properties"]["stages"] = {
        "description": "Several runs: of each its name, and how it differs from the whole.",
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "required": ["name"]},
    }
    whole["anyOf"] = [{"required": whole.pop("required")}, {"required": ["stages", "output"]}]
    return whole
