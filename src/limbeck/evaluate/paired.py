"""Models compared on the same items: differences, McNemar's test, quality retained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from limbeck.evaluate.scores import Interval, interval, resampled

TINY = 1e-9
"""Stands for an advantage over a guess that a few resamples do not have."""

Values = Float64[np.ndarray, " items"]


def compared_items(values: Mapping[str, Values], floor: Values) -> dict[str, Any]:
    """Scores of several models on the same items, and what they mean relative to each other.

    Args:
        values: By model, `teacher` among them: its score on each item, higher is better.
        floor: Expected score of a guess on each item.

    Returns:
        items, floor; `models` with the mean of each; `retained` (see `quality_retained`); and
        `against`, where the distilled student meets every other model (see `versus`).
    """
    others = [name for name in values if name != "distilled"] if "distilled" in values else []
    teacher = values["teacher"]
    kept = {n: quality_retained(v, teacher, floor) for n, v in values.items() if n != "teacher"}
    return {
        "items": len(floor),
        "floor": float(floor.mean()),
        "models": {name: mean(value) for name, value in values.items()},
        "retained": {name: figure for name, figure in kept.items() if figure is not None},
        "against": {name: versus(values["distilled"], values[name]) for name in others},
    }


def mean(values: Values) -> Interval:
    """The mean over items, with its interval."""
    drawn = resampled({"value": values})
    return interval(drawn["value"] / len(values))


def quality_retained(student: Values, teacher: Values, floor: Values) -> Interval | None:
    """(student - floor) / (teacher - floor), means over the same resampled items.

    0 is a guess, 1 the teacher. None where the teacher is not above the floor in 95 % of the
    resamples and more: nothing is there to be retained, and the ratio has no bounded interval.
    """
    drawn = resampled({"student": student - floor, "teacher": teacher - floor})
    if interval(drawn["teacher"])["low"] <= 0:
        return None
    return interval(drawn["student"] / drawn["teacher"].clip(min=TINY))


def versus(student: Values, other: Values) -> dict[str, Any]:
    """The student's mean less the other's; items only one has right; McNemar's exact p.

    The counts and p are there where every score is 0 or 1.
    """
    drawn = resampled({"difference": student - other})
    found: dict[str, Any] = {"difference": interval(drawn["difference"] / len(student))}
    if np.isin(np.stack([student, other]), (0, 1)).all():
        better, worse = int((student > other).sum()), int((student < other).sum())
        found |= {"only_student": better, "only_other": worse, "p": mcnemar(better, worse)}
    return found


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test: of a fair coin, a split at least as uneven as this."""
    n, least = better + worse, min(better, worse)
    logs = [log_choose(n, k) - n * math.log(2) for k in range(least + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def log_choose(n: int, k: int) -> float:
    """Natural log of the number of ways to choose k of n."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def same_items(keys: Mapping[str, Sequence[str]]) -> bool:
    """Whether all models were measured on the same items in the same order."""
    return len({tuple(each) for each in keys.values()}) == 1
