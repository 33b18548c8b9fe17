"""The exports of a run: refused before step 0 where they cannot work, verified after it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from limbeck.config import RunConfig
from limbeck.data import corpus_path
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.parts import Parts
from limbeck.export import HeldOutText, export_student, exporters, open_student
from limbeck.export.base import Exporter
from limbeck.files import expanded

PARITY_TOKENS = 2048
"""Positions of held-out text on which a file is compared with the student."""


def exports_of(config: RunConfig) -> dict[str, Exporter]:
    """The recipe's exporters, each under the name of its folder, as `gguf-q4_k_m` or `onnx`.

    Raises:
        ConfigError: Two have the same name.
    """
    found: dict[str, Exporter] = {}
    for index, spec in enumerate(config.export):
        exporter = exporters.bind(spec, f"export[{index}]")()
        stem, _, ending = exporter.suffix.removeprefix("-").rpartition(".")
        name = f"{ending}-{stem}" if stem else ending
        if name in found:
            raise ConfigError(f"export[{index}]: each format is exported once, got {name} twice.")
        found[name] = exporter
    return found


def require_exports(config: RunConfig, parts: Parts) -> None:
    """Refuse, before step 0, exports that lack their library or cannot hold the student."""
    for exporter in exports_of(config).values():
        exporter.require()
        assert parts.student is not None, "step 0 has not begun"
        exporter.require_student(parts.student.model, parts.tokenizer)


def write_exports(config: RunConfig) -> dict[str, Any]:
    """Export the student of a finished run into `exports/`, replacing earlier ones.

    Returns:
        What parity.json holds for each, or why it was not published.
    """
    verdicts: dict[str, Any] = {}
    text = parity_text(config)
    for name, exporter in exports_of(config).items():
        folder = config.output / "exports" / name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            verdicts[name] = export_student(exporter, open_student(config.output), folder, text)
        except (ConfigError, DataError) as error:
            verdicts[name] = {"failed": str(error)}
    return verdicts


def parity_text(config: RunConfig) -> HeldOutText:
    """The recipe's held-out text, if it is a file whose columns have their usual names."""
    path = config.evaluate.data
    if not isinstance(path, str) or config.data.columns or not expanded(path).exists():
        return HeldOutText("text", str(corpus_path("heldout")), PARITY_TOKENS)
    return HeldOutText(config.data.type, path, PARITY_TOKENS)


def require_parity(evaluation: Mapping[str, Any]) -> None:
    """Fail where an export of a finished run failed.

    Raises:
        DataError: One did; the run itself is whole.
    """
    exports = evaluation.get("exports", {})
    if failed := {n: each["failed"] for n, each in exports.items() if "failed" in each}:
        lines = [f"exports/{name}: {why}" for name, why in failed.items()]
        raise DataError(
            "\n  ".join(
                [
                    "The run is complete, and its student was not exported in every format; these "
                    "were not published:",
                    *lines,
                ]
            )
        )
