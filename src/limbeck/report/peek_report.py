"""The HTML page of a peek."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.report.pages import page


def peek_page(peek: Mapping[str, Any], *, teacher: str, student: str | None) -> str:
    """One self-contained HTML page of a peek.

    Args:
        peek: What `limbeck.evaluate.peek.Peek.to_plain` gives.
    """
    positions = [position_values(p, len(peek["temperatures"])) for p in peek["positions"]]
    values = {"peek": peek, "positions": positions, "teacher": teacher, "student": student}
    return page("peek.html", values)


def position_values(position: Mapping[str, Any], num_temperatures: int) -> dict[str, Any]:
    """A position with what its bars need: the longest of each column, and all other tokens."""
    candidates: Sequence[Mapping[str, Any]] = position["candidates"]
    return {
        **position,
        "longest": [longest(candidates, t) for t in range(num_temperatures)],
        "rest_teacher": [rest(candidates, "teacher", t) for t in range(num_temperatures)],
        "rest_student": [rest(candidates, "student", t) for t in range(num_temperatures)],
        "choices": math.exp(position["entropy"][0]),
    }


def longest(candidates: Sequence[Mapping[str, Any]], temperature: int) -> float:
    """The largest probability among the candidates, either model's; the full width of a column."""
    both = [c[who][temperature] for c in candidates for who in ("teacher", "student") if c[who]]
    return max(both, default=1.0) or 1.0


def rest(candidates: Sequence[Mapping[str, Any]], who: str, temperature: int) -> float | None:
    """Probability of every token that is not a candidate; None for a model that is not there."""
    if not candidates or not candidates[0][who]:
        return None
    return max(0.0, 1.0 - sum(float(c[who][temperature]) for c in candidates))
