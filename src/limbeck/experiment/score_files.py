"""A student's figures on disk: a finished trial is measured once, and compared ever after."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError
from limbeck.evaluate.scores import Scores
from limbeck.files import write_text


def write_scores(path: Path, deciding: Scores | None, reporting: Scores | None) -> None:
    """Keep a student's figures on the documents that decide and on those that report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    both = {"deciding": plain(deciding), "reporting": plain(reporting)}
    write_text(path, json.dumps(both))


def read_scores(path: Path) -> tuple[Scores | None, Scores | None]:
    """The figures `write_scores` kept: deciding, reporting.

    Raises:
        DataError: The file is not one of limbeck's.
    """
    try:
        both = json.loads(path.read_text(encoding="utf-8"))
        return scores(both["deciding"]), scores(both["reporting"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} must hold a student's figures, and cannot be read ({error}). Run "
            "`limbeck distill` with --resume, which makes it again."
        ) from error


def plain(figures: Scores | None) -> dict[str, Any] | None:
    """Figures as JSON."""
    if figures is None:
        return None
    values = {f.name: vars(figures)[f.name] for f in dataclasses.fields(figures)}
    metrics = {name: total.tolist() for name, total in figures.metrics.items()}
    arrays = {k: v.tolist() for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**arrays, "metrics": metrics, "padded_mass": figures.padded_mass}


def scores(saved: dict[str, Any] | None) -> Scores | None:
    """Figures from JSON."""
    if saved is None:
        return None
    return Scores(
        metrics={name: np.array(total) for name, total in saved["metrics"].items()},
        counts=np.array(saved["counts"]),
        bytes=np.array(saved["bytes"]),
        calibration=np.array(saved["calibration"]),
        documents=np.array(saved["documents"], dtype=np.int64),
        padded_mass=saved["padded_mass"],
    )
