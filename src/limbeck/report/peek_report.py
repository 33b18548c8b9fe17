"""The HTML page of a peek."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from limbeck.report.pages import page


def peek_page(peek: Mapping[str, Any], *, teacher: str, student: str | None) -> str:
    """One self-contained HTML page of a peek.

    Args:
        peek: What `limbeck.evaluate.peek.Peek.to_plain` gives.
    """
    positions = [{**p, "choices": math.exp(p["entropy"][0])} for p in peek["positions"]]
    values = {"peek": peek, "positions": positions, "teacher": teacher, "student": student}
    return page("peek.html", values)
