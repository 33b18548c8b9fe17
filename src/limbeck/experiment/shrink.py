"""Pruning a teacher: measures layers, makes and saves a student, or plans three shapes."""

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
    LoadedTeacher,
    PrunedVocabulary,
    measured,
    open_teacher,
    prune_vocabulary,
    read,
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
class ShrinkSetup:
    """A teacher to prune, and its calibration text.

    Attributes:
        teacher: In eval mode, with its vocabulary pruned if asked for.
        tokens: Positions on which importance is measured.
        calibration: Its first rows, on which importance is measured.
        held_out: The rows after them, on which candidates are compared.
        removals: Layers removed greedily by loss so far, kept for the next request.
    """

    source: ModelSource
    teacher: CausalLM
    tokenizer: PreTrainedTokenizerBase
    text: TextData
    tokens: int
    calibration: Calibration
    held_out: Calibration
    pruned: PrunedVocabulary | None = None
    removals: list[dict[str, Any]] = field(default_factory=list)

    @property
    def found_teacher(self) -> LoadedTeacher:
        """The teacher before its vocabulary was pruned."""
        if self.pruned is not None:
            return self.pruned.teacher
        return LoadedTeacher(self.source, self.teacher, self.tokenizer)

    @property
    def origin(self) -> Origin:
        """The inputs of student initialisers."""
        teacher = self.teacher
        alone = World(0, 1, teacher.hf_model.device)
        dtype = teacher.hf_model.dtype
        return Origin(teacher, self.tokenizer, alone, dtype, text=lambda: self.text)

    def make(self, spec: Component) -> InitialStudent:
        """The student that a recipe's `student:` section describes."""
        return initialisers.bind(spec, "student")(self.origin)


@dataclass(frozen=True)
class Shrunk:
    """A student with what was measured.

    Attributes:
        cost: Of the student on held-out calibration rows, before distillation.
        importance: Of each layer; see `layer_table`.
        candidates: Other choices of as many layers, each with its cost.
    """

    student: InitialStudent
    cost: Cost
    importance: Sequence[Mapping[str, Any]]
    candidates: Sequence[Mapping[str, Any]]


def open_shrink(
    source: ModelSource,
    *,
    kind: str,
    data: str,
    tokens: int,
    device: torch.device,
    vocabulary: Sequence[str] = (),
) -> ShrinkSetup:
    """Load a teacher and its calibration text.

    Args:
        kind: How a row of the text reads, as `data.type` of a recipe.
        tokens: Positions to measure importance on, and as many more to compare candidates on.
        vocabulary: Data, as `kind` reads them, whose tokens the vocabulary is pruned to first.
    """
    opened = open_teacher(source, device)
    pruned = prune_vocabulary(opened, vocabulary, kind) if vocabulary else None
    teacher = opened.model if pruned is None else pruned.model
    tokenizer = opened.tokenizer if pruned is None else pruned.tokenizer
    text = read(data, kind, tokenizer, teacher.max_positions)
    pruned = None if pruned is None else measured(pruned, text, tokens)
    calibration = calibrate(teacher, text, tokens)
    return ShrinkSetup(
        source, teacher, tokenizer, text, tokens, calibration,
        calibrate(teacher, text, tokens, held_out=True), pruned,
    )  # fmt: skip


def shrink(setup: ShrinkSetup, spec: Component, say: Say = lambda _: None) -> Shrunk:
    """Measure every layer, make the student, and compare it with other choices of layers."""
    say("Measuring every layer ...")
    importance = layer_table(setup.calibration)
    say("Making the student ...")
    student = setup.make(spec)
    others = list(other_choices(setup, student))
    return Shrunk(student, setup.held_out.cost(student.model), importance, others)


def layer_table(calibration: Calibration) -> list[dict[str, Any]]:
    """Block influence of each layer, and the cost of the teacher without it."""
    layers = range(calibration.teacher.num_layers)
    influence = block_influence(calibration)
    costs = costs_without(calibration, [(layer,) for layer in layers])
    return [
        {"layer": i, "block_influence": influence[i], **costs[i]._asdict()} for i in layers
    ]  # fmt: skip


def other_choices(setup: ShrinkSetup, student: InitialStudent) -> Iterator[dict[str, Any]]:
    """Cost of the teacher with as many layers chosen by each method, the student's included."""
    kept = tuple(student.facts["layers_kept"])
    chosen = student.facts.get("chosen", {}).get("by")
    total = setup.teacher.num_layers
    if len(kept) == total:
        return
    quick: tuple[By, ...] = ("even", "block_influence", "span")
    ways: dict[str, tuple[int, ...]] = {
        by: choose_layers(setup.calibration, len(kept), by)[0] for by in quick
    }
    ways[str(chosen or "listed")] = kept
    for by, layers in ways.items():
        with without(setup.teacher, [i for i in range(total) if i not in layers]):
            cost = setup.held_out.cost(setup.teacher)
        yield {"by": by, "layers": list(layers), **cost._asdict()}


def plan(
    setup: ShrinkSetup, target: int, by: By, say: Say = lambda _: None
) -> list[dict[str, Any]]:
    """Three shapes of at most `target` parameters, measured; lowest forward KL first.

    Forward KL and cross-entropy are measured before distillation, on held-out calibration rows.
    Speeds are measured side by side in one process, so compare their ratios.
    """
    made: dict[str, InitialStudent] = {}
    refused: list[str] = []
    for name in SHAPES:
        say(f"Making and measuring the {name} student ...")
        try:
            made[name] = setup.make(listed(setup, spec_for(setup, target, name, by)))
        except ConfigError as error:
            refused.append(str(error))
    if not made:
        raise ConfigError(refused[0])
    models = {name: student.model for name, student in made.items()}
    per_second = speeds({"teacher": setup.teacher, **models})
    found: list[dict[str, Any]] = []
    for name, student in made.items():
        cost = setup.held_out.cost(student.model)
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


def spec_for(setup: ShrinkSetup, target: int, shape: str, by: By) -> dict[str, Any]:
    """The `student:` section for at most `target` parameters: fewer layers, narrower, or both."""
    config, options = setup.teacher.config, {"by": by, "calibration_tokens": setup.tokens}
    if shape == "depth":
        return {"type": "depth", "keep": layers_for(config, target), **options}
    depth = {"layers": halfway_layers(config, target)} if shape == "both" else {}
    return {"type": "width", "params": target, **depth, **options}


def listed(setup: ShrinkSetup, spec: dict[str, Any]) -> dict[str, Any]:
    """The same with its layers chosen now, so that greedy choices continue from earlier ones."""
    option = "keep" if spec["type"] == "depth" else "layers"
    if option not in spec or spec["by"] != "loss":
        return spec
    kept, removals = greedy(setup.calibration, spec[option], known=setup.removals)
    setup.removals.extend(removals[len(setup.removals) :])
    rest = {name: value for name, value in spec.items() if name not in (option, "by")}
    return {**rest, "layers": list(kept)}


def save_shrunk(setup: ShrinkSetup, found: Shrunk, folder: Path) -> None:
    """Publish a Hugging Face folder with limbeck.json, importance.json and importance.svg."""

    def write(place: Path) -> None:
        save_student(found.student.model, found.student.tokenizer, place)
        facts = setup.text.facts
        text = {"name": Path(facts["path"]).name, "sha256": facts["sha256"]}
        more = {"limbeck": __version__, "text": text}
        if setup.pruned is not None:
            more["vocabulary"] = write_table(place, setup.pruned)
        write_provenance(place, found.student, setup.found_teacher.facts, more)
        write_text(place / "importance.json", json.dumps(as_plain(found), indent=1))
        write_text(place / "importance.svg", shrink_plot(as_plain(found)))

    publish(folder, write, {"kind": "student"})


def as_plain(found: Shrunk) -> dict[str, Any]:
    """Everything measured, as JSON."""
    facts = found.student.facts
    return {
        "cost": found.cost._asdict(),
        "importance": list(found.importance),
        "candidates": list(found.candidates),
        "made": dict(facts),
    }
