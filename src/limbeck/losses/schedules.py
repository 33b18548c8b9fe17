"""Numbers that change with the optimizer step, as pure functions of it: a resumed run agrees."""

from __future__ import annotations

import itertools
import math

from limbeck.config.schedules import Schedule, Varying


def at(number: float, step: int) -> float:
    """The number in an optimizer step, counted from 0; itself where it has no schedule.

    Example:
        >>> from limbeck.config.schedules import Schedule, Varying
        >>> alpha = Varying(Schedule(type="linear", values={0: 0.0, 100: 0.8}))
        >>> at(alpha, 50), at(alpha, 1000), at(0.3, 50)
        (0.4, 0.8, 0.3)
    """
    return value(number.schedule, step) if isinstance(number, Varying) else number


def value(schedule: Schedule, step: int) -> float:
    """A schedule's value in a step; the nearest end's before its first and after its last."""
    points = sorted(schedule.values.items())
    if step < points[0][0]:
        return points[0][1]
    for (start, before), (end, after) in itertools.pairwise(points):
        if start <= step < end:
            return before + (after - before) * progress(schedule, (step - start) / (end - start))
    return points[-1][1]


def progress(schedule: Schedule, share: float) -> float:
    """How much of the way between two values is gone, when a share of the steps is."""
    match schedule.type:
        case "linear":
            return share
        case "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * share)
        case "table":
            return 0.0


def largest(number: float) -> float:
    """The most a number ever is."""
    return max(number.schedule.values.values()) if isinstance(number, Varying) else number
