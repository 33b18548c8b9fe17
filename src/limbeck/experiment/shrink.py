"""A teacher made smaller: measured first, then cut and saved, or only planned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck import __version__
from limbeck.data import TextData
from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.evaluate.speed import speeds
from limbeck.experiment.vocabulary import (
    Teacher,
    Trimming,
    measured,
    open_teacher,
    read,
    trim,
    write_table,
)
from limbeck.files import publish, write_text
from limbeck.models import CausalLM, ModelSource, PreTrainedTokenizerBase, save_student
from limbeck.prune.calibration import Calibration, Cost, calibrate
from limbeck.prune.importance import block_influence, costs_without, greedy, without
from limbeck.prune.targets import halfway_layers, layers_for
from limbeck.registry import Component
from limbeck.report.shrink_plot import shrink_plot
from limbeck.students import InitialStudent, Origin, initialisers
from limbeck.students.depth import By, choose_layers
from limbeck.students.provenance import write_provenance

SHAPES = ("depth", "both", "width")
"""What a number of parameters may be cut from."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """A teacher to be made smaller, and the text it is measured on.

    Attributes:
        source: Where it is from.
        teacher: In eval mode; without some of its tokens where these were trimmed.
        tokenizer: Its tokenizer.
        text: Calibration text.
        tokens: Positions of it to weigh parts on.
        calibration: Its first rows, on which parts are weighed.
        held_out: The rows after them, on which candidates are compared.
        trimming: What became of its vocabulary; None where it is whole.
        removals: Layers that were taken out one after the other by loss, as far as anybody asked.
    """

    source: ModelSource
    teacher: CausalLM
    tokenizer: PreTrainedTokenizerBase
    text: TextData
    tokens: int
    calibration: Calibration
    held_out: Calibration
    trimming: Trimming | None = None
    removals: list[dict[str, Any]] = field(default_factory=list)

    @property
    def found_teacher(self) -> Teacher:
        """The teacher as it was found, its vocabulary whole."""
        if self.trimming is not None:
            return self.trimming.teacher
        return Teacher(self.source, self.teacher, self.tokenizer)

    @property
    def origin(self) -> Origin:
        """What a student is made from."""
        teacher = self.teacher
        alone = World(0, 1, teacher.hf_model.device)
        dtype = teacher.hf_model.dtype
        return Origin(teacher, self.tokenizer, alone, dtype, text=lambda: self.text)

    def make(self, spec: Component) -> InitialStudent:
        """The student a recipe's `student:` would name."""
        return initialisers.bind(spec, "student")(self.origin)


@dataclass(frozen=True)
class Shrunk:
    """What was found and made.

    Attributes:
        student: The smaller model.
        cost: Of it, on held-out calibration rows, before any healing.
        importance: Of each layer; see `layer_table`.
        candidates: Ways to choose as many layers, with what they cost.
    """

    student: InitialStudent
    cost: Cost
    importance: Sequence[Mapping[str, Any]]
    candidates: Sequence[Mapping[str, Any]]


def open_bench(
    source: ModelSource,
    *,
    kind: str,
    data: str,
    tokens: int,
    device: torch.device,
    vocabulary: Sequence[str] = (),
) -> Bench:
    """Load a teacher and its calibration text.

    Args:
        source: The teacher.
        kind: How a row of the text reads, as `data.type` of a recipe.
        data: The text.
        tokens: Positions to weigh parts on, and as many more to compare candidates on.
        device: Where to compute.
        vocabulary: Data, as `kind` reads them, whose tokens the teacher is trimmed to first.

    Raises:
        ConfigError: The teacher or the text cannot be used, or the text is too short.
    """
    opened = open_teacher(source, device)
    trimming = trim(opened, vocabulary, kind) if vocabulary else None
    teacher = opened.model if trimming is None else trimming.model
    tokenizer = opened.tokenizer if trimming is None else trimming.tokenizer
    text = read(data, kind, tokenizer, teacher.max_positions)
    trimming = None if trimming is None else measured(trimming, text, tokens)
    calibration = calibrate(teacher, text, tokens)
    return Bench(
        source, teacher, tokenizer, text, tokens, calibration,
        calibrate(teacher, text, tokens, held_out=True), trimming,
    )  # fmt: skip


def shrink(bench: Bench, spec: Component, say: Say = lambda _: None) -> Shrunk:
    """Weigh the layers, make the student, and compare it with what else could have been made."""
    say("Weighing every layer ...")
    importance = layer_table(bench.calibration)
    say("Making the student ...")
    student = bench.make(spec)
    others = list(other_choices(bench, student))
    return Shrunk(student, bench.held_out.cost(student.model), importance, others)


def layer_table(calibration: Calibration) -> list[dict[str, Any]]:
    """Of each layer its block influence, and what the teacher costs without it alone."""
    layers = range(calibration.teacher.num_layers)
    influence = block_influence(calibration)
    costs = costs_without(calibration, [(layer,) for layer in layers])
    return [
        {"layer": i, "block_influence": influence[i], **costs[i]._asdict()} for i in layers
    ]  # fmt: skip


def other_choices(bench: Bench, student: InitialStudent) -> Iterator[dict[str, Any]]:
    """The teacher with as many layers chosen in each way, and with those of the student."""
    kept = tuple(student.facts["layers_kept"])
    chosen = student.facts.get("chosen", {}).get("by")
    total = bench.teacher.num_layers
    if len(kept) == total:
        return
    quick: tuple[By, ...] = ("even", "block_influence", "span")
    ways: dict[str, tuple[int, ...]] = {
        by: choose_layers(bench.calibration, len(kept), by)[0] for by in quick
    }
    ways[str(chosen or "listed")] = kept
    for by, layers in ways.items():
        with without(bench.teacher, [i for i in range(total) if i not in layers]):
            cost = bench.held_out.cost(bench.teacher)
        yield {"by": by, "layers": list(layers), **cost._asdict()}


def plan(bench: Bench, target: int, by: By, say: Say = lambda _: None) -> list[dict[str, Any]]:
    """Three shapes of at most so many parameters, made and measured, the nearest to it first.

    Forward KL and cross-entropy are those before any healing, on held-out calibration rows; speeds
    are taken side by side in one process, so that their ratios mean something.

    Raises:
        ConfigError: No shape has so few parameters.
    """
    made: dict[str, InitialStudent] = {}
    refused: list[str] = []
    for name in SHAPES:
        say(f"Making and measuring the {name} student ...")
        try:
            made[name] = bench.make(listed(bench, spec_for(bench, target, name, by)))
        except ConfigError as error:
            refused.append(str(error))
    if not made:
        raise ConfigError(refused[0])
    models = {name: student.model for name, student in made.items()}
    per_second = speeds({"teacher": bench.teacher, **models})
    found: list[dict[str, Any]] = []
    for name, student in made.items():
        cost = bench.held_out.cost(student.model)
        facts = {
            "shape": name,
            "layers": student.model.num_layers,
            "widths": student.facts.get("widths", {}),
            "layers_kept": student.facts["layers_kept"],
            "parameters": student.model.num_parameters,
            "bytes": student.facts["bytes"],
            "tokens_per_second": per_second[name],
            "speed_ratio": per_second[name] / per_second["teacher"],
        }
        found.append({**facts, **cost._asdict()})
    return sorted(found, key=lambda shape: float(shape["forward_kl"]))


def spec_for(bench: Bench, target: int, shape: str, by: By) -> dict[str, Any]:
    """The `student:` of a recipe with at most so many parameters: fewer layers, narrower, or both.

    Raises:
        ConfigError: No such shape has so few.
    """
    config, told = bench.teacher.config, {"by": by, "calibration_tokens": bench.tokens}
    if shape == "depth":
        return {"type": "depth", "keep": layers_for(config, target), **told}
    depth = {"layers": halfway_layers(config, target)} if shape == "both" else {}
    return {"type": "width", "params": target, **depth, **told}


def listed(bench: Bench, spec: dict[str, Any]) -> dict[str, Any]:
    """The same with its layers chosen on the bench, where greedy choices go on from one another."""
    option = "keep" if spec["type"] == "depth" else "layers"
    if option not in spec or spec["by"] != "loss":
        return spec
    kept, removals = greedy(bench.calibration, spec[option], known=bench.removals)
    bench.removals.extend(removals[len(bench.removals) :])
    rest = {name: value for name, value in spec.items() if name not in (option, "by")}
    return {**rest, "layers": list(kept)}


def save_shrunk(bench: Bench, found: Shrunk, folder: Path) -> None:
    """A Hugging Face folder with limbeck.json and the plot and table of importance beside it."""

    def write(place: Path) -> None:
        save_student(found.student.model, found.student.tokenizer, place)
        facts = bench.text.facts
        text = {"name": Path(facts["path"]).name, "sha256": facts["sha256"]}
        more = {"limbeck": __version__, "text": text}
        if bench.trimming is not None:
            more["vocabulary"] = write_table(place, bench.trimming)
        write_provenance(place, found.student, bench.found_teacher.facts, more)
        write_text(place / "importance.json", json.dumps(as_plain(found), indent=1))
        write_text(place / "importance.svg", shrink_plot(as_plain(found)))

    publish(folder, write, {"kind": "student"})


def as_plain(found: Shrunk) -> dict[str, Any]:
    """What was found, for JSON."""
    facts = found.student.facts
    return {
        "cost": found.cost._asdict(),
        "importance": list(found.importance),
        "candidates": list(found.candidates),
        "made": dict(facts),
    }
