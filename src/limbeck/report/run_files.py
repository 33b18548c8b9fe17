"""Contents of a run directory, read and validated; fields not named here are ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from limbeck.errors import DataError

BASELINE = "cross_entropy"
"""The stage that trained with cross-entropy only."""

Form = TypeVar("Form")


@dataclass(frozen=True)
class Figure:
    """A figure and the ends of its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __neg__(self) -> Figure:
        """The figure with the other sign."""
        ends = (None if end is None else -end for end in (self.high, self.low))
        return Figure(-self.value, *ends)


@dataclass(frozen=True)
class ModelSize:
    """How large and how fast a model is."""

    parameters: int | None = None
    bytes: int | None = None
    layers: int | None = None
    width: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Disagreement:
    """A held-out token where student and teacher differ."""

    context: str
    target: str
    forward_kl: float
    teacher: tuple[tuple[str, float], ...]
    student: tuple[tuple[str, float], ...]
    document: str = ""


@dataclass(frozen=True)
class ParityFigures:
    """How far an exported file is from the student."""

    mean_kl: float
    max_kl: float
    same_top: float
    student_perplexity: float
    exported_perplexity: float


@dataclass(frozen=True)
class Export:
    """A student's file in another format, or why there is none."""

    file: str = ""
    bytes: int = 0
    parity: ParityFigures | None = None
    failed: str | None = None


@dataclass(frozen=True)
class GroupFigures:
    """A student on a group of the held-out tokens."""

    group: str
    tokens: int
    forward_kl: Figure | None = None
    top1_agreement: Figure | None = None


@dataclass(frozen=True)
class GenerationFigures:
    """Samples of a student, and of its teacher after the same prompts."""

    prompts: int = 0
    student: dict[str, Figure | float] = field(default_factory=dict)
    teacher: dict[str, Figure | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Versus:
    """The distilled student beside another model on the same items."""

    difference: Figure
    p: float | None = None


@dataclass(frozen=True)
class TaskRow:
    """Models on the items of a task under one metric."""

    task: str
    metric: str
    items: int
    floor: float
    models: dict[str, Figure]
    retained: dict[str, Figure] = field(default_factory=dict)
    against: dict[str, Versus] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskFigures:
    """What lm-evaluation-harness found."""

    harness: str = ""
    rows: tuple[TaskRow, ...] = ()


@dataclass(frozen=True)
class SpeculativeFigures:
    """Drafts of a student that its teacher accepted."""

    prompts: int
    draft_tokens: int
    acceptance: Figure
    shared: Figure
    tokens_per_pass: Figure


@dataclass(frozen=True)
class SuiteFigures:
    """The further suites that the report shows; those of a user's own are left out."""

    generation: dict[str, GenerationFigures] = field(default_factory=dict)
    tasks: TaskFigures = field(default_factory=TaskFigures)
    speculative: dict[str, SpeculativeFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedFigure(Figure):
    """A mean over seeds, its interval over seeds and documents, and each seed's figure."""

    each: tuple[float, ...] = ()


@dataclass(frozen=True)
class SeedFigures:
    """Both students with several seeds; `difference` is the baseline's figure less the other's."""

    seeds: tuple[int, ...] = ()
    trials: dict[str, dict[str, SeedFigure]] = field(default_factory=dict)
    difference: dict[str, SeedFigure] = field(default_factory=dict)


@dataclass(frozen=True)
class SetFigures:
    """What was measured on one of several held-out texts."""

    trials: dict[str, dict[str, Figure]] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out text; every part may be missing."""

    metrics: tuple[str, ...] = ()
    trials: dict[str, dict[str, Figure]] = field(default_factory=dict)
    gap_recovered_percent: dict[str, Figure] = field(default_factory=dict)
    difference: dict[str, Figure] = field(default_factory=dict)
    control: dict[str, Figure] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)
    models: dict[str, ModelSize] = field(default_factory=dict)
    disagreements: tuple[Disagreement, ...] = ()
    continuations: tuple[dict[str, str], ...] = ()
    padded_mass: dict[str, float] = field(default_factory=dict)
    learning_rate: dict[str, float] = field(default_factory=dict)
    exports: dict[str, Export] = field(default_factory=dict)
    sets: dict[str, SetFigures] = field(default_factory=dict)
    chosen_by_set: str | None = None
    teacher_advantage: dict[str, Figure] = field(default_factory=dict)
    groups: dict[str, dict[str, tuple[GroupFigures, ...]]] = field(default_factory=dict)
    suites: SuiteFigures = field(default_factory=SuiteFigures)
    seeds: SeedFigures = field(default_factory=SeedFigures)


@dataclass(frozen=True)
class RunFiles:
    """A run directory's contents.

    Attributes:
        baseline: Lines of the cross-entropy stage's metrics.jsonl; none without that stage.
        evaluation: Of evaluation.json; None when nothing was held out.
    """

    name: str
    recipe: str
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    baseline: list[dict[str, Any]]
    evaluation: Evaluation | None


def read_run(directory: Path) -> RunFiles:
    """Everything the report needs.

    Raises:
        DataError: recipe.yaml, provenance.json or metrics.jsonl is missing, or one of them or
            evaluation.json is damaged.
    """
    measured = directory / "evaluation.json"
    evaluation = (
        checked(measured, TypeAdapter(Evaluation).validate_python) if measured.exists() else None
    )
    baseline = baseline_metrics(directory, evaluation)
    return RunFiles(
        name=directory.resolve().name,
        recipe=text(directory / "recipe.yaml"),
        provenance=checked(
            directory / "provenance.json", TypeAdapter(dict[str, Any]).validate_python
        ),
        metrics=lines(directory / "metrics.jsonl"),
        baseline=lines(baseline) if baseline.exists() else [],
        evaluation=evaluation,
    )


def baseline_metrics(directory: Path, evaluation: Evaluation | None) -> Path:
    """Where the baseline's curves are; of a grid of learning rates, the best one's."""
    stage = directory / "stages" / BASELINE
    rate = evaluation.learning_rate.get(BASELINE) if evaluation else None
    if not stage.exists() and rate is not None:
        stage = stage.with_name(f"{BASELINE}-{rate:g}")
    return stage / "metrics.jsonl"


def text(path: Path) -> str:
    """A text file of the run."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"A report needs {path}, and it cannot be read: {error}. Name a run directory, or run "
            "`limbeck distill` again to finish it."
        ) from error


def checked(path: Path, validate: Callable[[Any], Form]) -> Form:
    """A JSON file of the run, as `validate` reads it."""
    try:
        return validate(json.loads(text(path)))
    except RecursionError:
        raise damaged(path, "it is nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise damaged(path, f"{where}: {first['msg']}") from error
    except json.JSONDecodeError as error:
        raise damaged(path, str(error)) from error


def last_step(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last step of a metrics.jsonl; without any, its sums are 0."""
    steps = [record for record in records if record.get("kind") == "step"]
    return steps[-1] if steps else {"tokens": 0, "seconds": 0.0}


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line that was cut off while being written is left out.

    Raises:
        DataError: It cannot be read, or a whole line is damaged.
    """
    whole, _, _ = text(path).rpartition("\n")
    found = []
    for i, line in enumerate(whole.split("\n"), start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise damaged(path, f"line {i}: {error}") from error
        if not isinstance(value, dict):
            raise damaged(path, f"line {i} holds {type(value).__name__}, not an object")
        found.append(value)
    return found


def damaged(path: Path, what: str) -> DataError:
    """The error for a file that does not hold what it should."""
    return DataError(
        f"{path} must hold what limbeck wrote there, but {what}. Restore it, or remove it and run "
        "`limbeck evaluate` or `limbeck distill` again."
    )


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
