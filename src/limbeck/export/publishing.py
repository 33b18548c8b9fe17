"""A student exported, verified in the runtime, and only then published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck.config import DataConfig
from limbeck.data import load_text
from limbeck.errors import ConfigError
from limbeck.export.base import ExportedFile, Exporter
from limbeck.export.modelfile import modelfile
from limbeck.export.parity import Parity, measure
from limbeck.files import publish, sha256, write_text
from limbeck.models import CausalLM, ModelSource, PreTrainedTokenizerBase, load_model, model_facts
from limbeck.tokenizers import load_tokenizer, tokens_by_id

WINDOW = 512
"""Positions of a window, but for the long one."""


@dataclass(frozen=True)
class Student:
    """A student to be exported.

    Attributes:
        model: On the CPU in float32; cut to its tokenizer's vocabulary.
        tokenizer: Its tokenizer.
        name: What its files are called.
        facts: Where it is from; JSON.
    """

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class HeldOutText:
    """What a file is compared with its student on.

    Attributes:
        kind: How a row reads: `text`, `completion` or `chat`.
        path: Of the text.
        tokens: Positions, in windows of at most 512; and at most as many in one long window.
    """

    kind: str
    path: str
    tokens: int


def open_student(path: Path) -> Student:
    """A student's folder, or that in a run's directory.

    Raises:
        ConfigError: It is none, or holds adapters that were not merged.
    """
    inside = path / "student"
    folder = inside if not (path / "config.json").is_file() and inside.is_dir() else path
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"An exported student needs its adapters merged, and {folder} holds "
            "adapter_config.json. Merge them: PeftModel.merge_and_unload(), then save_pretrained. "
            "Students that limbeck trains are merged already."
        )
    source = ModelSource(str(folder))
    model = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder))
    size = 1 + max(tokens_by_id(tokenizer))
    if size > model.vocabulary_rows:
        raise ConfigError(
            f"{folder} must have an embedding row for each of its tokenizer's {size:,} ids, and "
            f"has {model.vocabulary_rows:,}. Save it with its own tokenizer."
        )
    model.vocabulary_size = size
    named = folder.resolve()
    name = named.parent.name if folder == inside else named.name
    return Student(model, tokenizer, name, {**model_facts(source, model), "name": name})


def export_student(
    exporter: Exporter,
    student: Student,
    output: Path,
    text: HeldOutText,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a folder with the file, its parity and a Modelfile; or nothing, if parity fails.

    Args:
        exporter: The format.
        student: What to export.
        output: The folder; new.
        text: Held-out text.
        say: Called with what is being done.

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
        parity = verify(exporter, student, file, text)
        parity.require(path.name)
        report.update(
            {
                "student": dict(student.facts),
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "text": {"name": Path(text.path).name, "type": text.kind},
                **file.facts,
                "notes": list(file.notes),
                "parity": parity.to_plain(),
            }
        )
        write_text(folder / "parity.json", json.dumps(report, indent=1, ensure_ascii=False))
        if path.suffix == ".gguf":
            write_text(folder / "Modelfile", modelfile(student.model, student.tokenizer, file))

    publish(output, write, {"kind": "export"})
    return report


def verify(exporter: Exporter, student: Student, file: ExportedFile, text: HeldOutText) -> Parity:
    """A file beside its student on held-out text."""
    windows = windows_of(student, file.max_positions, text)
    with exporter.run(file) as runtime:
        return measure(student.model, student.tokenizer, runtime, file, windows, exporter.max_kl)


def windows_of(student: Student, max_positions: int, text: HeldOutText) -> list[list[int]]:
    """Windows of single documents, and all of them end to end as the last, long one."""
    config = DataConfig(
        type=text.kind, path=text.path, sequence_length=min(WINDOW, max_positions), pack=False
    )
    data = load_text(config, student.tokenizer, max_positions)
    rows = [data.batch([row]).input_ids[0].tolist() for row in data.token_rows(text.tokens)]
    whole = [token for row in rows for token in row]
    return [*(row for row in rows if len(row) > 1), whole[:max_positions]]
