"""The metrics of a finished trial, in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.errors import DataError
from limbeck.evaluate.scores import Scores
from limbeck.files import write_text


class TrialScores(NamedTuple):
    """A student's metrics; nothing where the recipe names no held-out text.

    Attributes:
        validation: On the validation documents of the held-out text that chooses.
        test: On its test documents.
        others: On the test documents of each further held-out text.
    """

    validation: Scores | None = None
    test: Scores | None = None
    others: Mapping[str, Scores] = {}


def write_scores(path: Path, scores: TrialScores) -> None:
    """Write a student's metrics."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        "validation": scores.validation and vars(scores.validation),
        "test": scores.test and vars(scores.test),
        "others": {name: vars(each) for name, each in scores.others.items()},
    }
    write_text(path, json.dumps(plain, default=np.ndarray.tolist))


def read_scores(path: Path) -> TrialScores:
    """A student's metrics."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        validation, test = (p and scores(p) for p in (plain["validation"], plain["test"]))
        others = {name: scores(each) for name, each in plain.get("others", {}).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} must hold a student's metrics, and cannot be read ({error}). Run "
            "`limbeck distill` with --resume, which makes it again."
        ) from error
    return TrialScores(validation, test, others)


def scores(saved: dict[str, Any]) -> Scores:
    """Scores from JSON."""
    return Scores(
        metrics={name: np.array(total) for name, total in saved["metrics"].items()},
        counts=np.array(saved["counts"]),
        bytes=np.array(saved["bytes"]),
        calibration=np.array(saved["calibration"]),
        documents=np.array(saved["documents"], dtype=np.int64),
        sources=tuple(saved.get("sources", ())),
        groups={
            kind: {name: np.array(sums) for name, sums in group.items()}
            for kind, group in saved.get("groups", {}).items()
        },
        padded_mass=saved["padded_mass"],
    )
