"""The shapes, made once and saved; greedy removals begin with those that are known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from limbeck import __version__
from limbeck.data import corpus_path
from limbeck.experiment.shrink import ShrinkSetup, listed, open_shrink
from limbeck.files import publish, write_text
from limbeck.models import ModelSource, model_facts, save_student
from limbeck.prune import cut_config
from limbeck.prune.narrow import num_parameters
from limbeck.prune.targets import halfway_layers
from limbeck.students.provenance import write_provenance

KNOWN = Path(__file__).parent / "removals.json"
"""Of the teacher, and on as much calibration text, as it says."""


def shape_folder(told: argparse.Namespace, shape: str) -> Path:
    """Where a shape is kept."""
    folder: Path = told.work / f"shapes-{told.calibration}" / shape.replace(":", "-")
    return folder


def make_shapes(told: argparse.Namespace, shapes: list[str]) -> None:
    """Every shape as a folder, those that are not there yet."""
    missing = [shape for shape in shapes if not shape_folder(told, shape).exists()]
    if not missing:
        return
    setup = open_shrink(
        ModelSource(told.teacher),
        kind="text",
        data=str(corpus_path("train")),
        tokens=told.calibration,
        device=torch.device("cpu"),
    )
    setup.removals.extend(known_removals(told, setup))
    for shape in missing:
        print(f"making {shape} ...", flush=True)
        spec = listed(setup, spec_of(told, setup, shape))
        write_text(removals_file(told), json.dumps(setup.removals))
        save(setup, spec, shape_folder(told, shape))


def spec_of(told: argparse.Namespace, setup: ShrinkSetup, shape: str) -> dict[str, Any]:
    """A shape as the `student:` of a recipe."""
    config, common = setup.teacher.config, {"calibration_tokens": told.calibration}
    first, _, second = shape.partition(":")
    if first not in ("width", "both"):
        return {"type": "depth", "keep": int(first), "by": second or "loss", **common}
    target = num_parameters(cut_config(config, range(int(second))))
    spec: dict[str, Any] = {"type": "width", "params": target, "by": "loss", **common}
    return spec | ({"layers": halfway_layers(config, target)} if first == "both" else {})


def save(setup: ShrinkSetup, spec: dict[str, Any], folder: Path) -> None:
    """As `limbeck shrink` saves a student, without its plots: they cost more than the student."""
    student = setup.make(spec)
    teacher = model_facts(setup.source, setup.teacher)

    def write(place: Path) -> None:
        save_student(student.model, student.tokenizer, place)
        write_provenance(place, student, teacher, {"limbeck": __version__})

    publish(folder, write, {"kind": "student"})


def removals_file(told: argparse.Namespace) -> Path:
    """Greedy removals that were found here."""
    path: Path = told.work / f"removals-{told.calibration}.json"
    return path


def known_removals(told: argparse.Namespace, setup: ShrinkSetup) -> list[dict[str, Any]]:
    """Greedy removals found here before, or recorded for this very teacher and calibration."""
    if removals_file(told).exists():
        return list(json.loads(removals_file(told).read_text()))
    recorded = json.loads(KNOWN.read_text())
    teacher = model_facts(setup.source, setup.teacher)
    same = (recorded["calibration_tokens"], recorded["weights_sha256"])
    if same != (told.calibration, teacher["weights_sha256"]):
        return []
    return list(recorded["removals"])
