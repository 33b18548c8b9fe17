"""The metrics of a finished trial, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError
from limbeck.evaluate.scores import Scores
from limbeck.files import write_text


def write_scores(path: Path, validation: Scores | None, test: Scores | None) -> None:
    """Write a student's metrics on the validation and the test documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    both = {"validation": validation and vars(validation), "test": test and vars(test)}
    write_text(path, json.dumps(both, default=np.ndarray.tolist))


def read_scores(path: Path) -> tuple[Scores | None, Scores | None]:
    """The metrics on the validation and the test documents."""
    try:
        both = json.loads(path.read_text(encoding="utf-8"))
        return scores(both["validation"]), scores(both["test"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} must hold a student's metrics, and cannot be read ({error}). Run "
            "`limbeck distill` with --resume, which makes it again."
        ) from error


def scores(saved: dict[str, Any] | None) -> Scores | None:
    """Scores from JSON."""
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
