"""A student exported, verified in the runtime, and only then published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.errors import ConfigError
from limbeck.export.base import ExportedFile, Exporter
from limbeck.export.held_out import HeldOutText, windows_of
from limbeck.export.parity import Parity, measure
from limbeck.files import publish, sha256, write_text
from limbeck.models import CausalLM, ModelSource, PreTrainedTokenizerBase, load_models, model_facts
from limbeck.models.source import student_inside
from limbeck.tokenizers import prove_same_vocabulary

SHORT = (2, 33)
"""Lengths of two more windows: a traced graph may be right at the traced length only."""


@dataclass(frozen=True)
class Student:
    """A student to be exported.

    Attributes:
        model: On the CPU in float32; cut to its tokenizer's vocabulary.
        name: What its files are called.
    """

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    facts: Mapping[str, Any]


def open_student(path: Path) -> Student:
    """A student's folder, or that in a run's directory."""
    inside = student_inside(path)
    folder = inside or path
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"An exported student needs its adapters merged, and {folder} holds "
            "adapter_config.json. Merge them: PeftModel.merge_and_unload(), then save_pretrained. "
            "Students that limbeck trains are merged already."
        )
    model, tokenizer = opened(folder)
    named = folder.resolve()
    name = named.parent.name if inside else named.name
    facts = model_facts(ModelSource(str(folder)), model)
    return Student(model, tokenizer, name, {**facts, "name": name})


def open_teacher(path: Path, student: Student) -> CausalLM:
    """A teacher's folder, if its tokens are the student's."""
    model, tokenizer = opened(path)
    proof = prove_same_vocabulary(
        student.tokenizer,
        tokenizer,
        student_rows=student.model.vocabulary_rows,
        teacher_rows=model.vocabulary_rows,
    )
    model.vocabulary_size = proof.size
    return model


def opened(folder: Path) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A model on the CPU in float32, cut to its tokenizer's vocabulary, and the tokenizer."""
    source, place = ModelSource(str(folder)), torch.device("cpu")
    (model,), tokenizer = load_models([source], device=place, dtype=torch.float32)
    return model, tokenizer


def export_student(
    exporter: Exporter,
    student: Student,
    output: Path,
    text: HeldOutText,
    teacher: CausalLM | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a folder with the file, its companions and its parity; or nothing, if parity fails.

    Args:
        teacher: Compared as well, for what quantising costs beside it.

    Returns:
        What parity.json holds.

    Raises:
        ConfigError: The format cannot hold the student.
        DataError: The file does not compute what the student computes.
    """
    report: dict[str, Any] = {}

    def write(folder: Path) -> None:
        say("Writing ...")
        path = folder / f"{student.name}{exporter.suffix}"
        file = exporter.export(student.model, student.tokenizer, path)
        say("Comparing with the student ...")
        parity = verify(exporter, student, file, text, teacher)
        parity.require(file.path.name)
        report.update(
            {
                "student": dict(student.facts),
                "file": file.path.name,
                "bytes": sum(part.stat().st_size for part in (file.path, *file.weights)),
                "sha256": sha256(file.path),
                "text": {"name": Path(text.path).name, "type": text.kind},
                **file.facts,
                "notes": list(file.notes),
                "parity": parity.to_plain(),
            }
        )
        write_text(folder / "parity.json", json.dumps(report, indent=1, ensure_ascii=False))

    publish(output, write, {"kind": "export"})
    return report


def verify(
    exporter: Exporter,
    student: Student,
    file: ExportedFile,
    text: HeldOutText,
    teacher: CausalLM | None,
) -> Parity:
    """Compare a file with its student on windows of documents, and on all concatenated."""
    rows = windows_of(student.tokenizer, file.max_positions, text)
    short = [rows[0][:length] for length in SHORT]
    windows = [*short, *rows, [token for row in rows for token in row][: file.max_positions]]
    model, limit = student.model, exporter.max_kl
    with exporter.run(file) as runtime:
        return measure(model, student.tokenizer, runtime, file, windows, limit, teacher)
