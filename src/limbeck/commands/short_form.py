"""The words of `limbeck distill TEACHER STUDENT DATA`; imports no model library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS = re.compile(r"([1-9]\d*)(?: layers?)?")
"""A student that is a number of the teacher's layers."""

SIZE = re.compile(r"\d+(?:\.\d+)?[KMB]", re.IGNORECASE)
"""A student that is a number of parameters."""


def is_short(words: Sequence[str]) -> bool:
    """Whether the arguments are models and data instead of a recipe and its changes."""
    return len(words) > 1 and "=" not in words[1]


def pruned_student(student: str) -> tuple[dict[str, Any] | None, str]:
    """The `student:` section where the word is a size and no model's folder, and a short name.

    Example:
        >>> pruned_student("1.5B")
        ({'type': 'depth', 'params': '1.5B', 'by': 'block_influence'}, '1.5B')
        >>> pruned_student("Qwen/Qwen2.5-0.5B")
        (None, 'Qwen2.5-0.5B')
    """
    layers = LAYERS.fullmatch(student)
    if Path(student).exists() or not (layers or SIZE.fullmatch(student)):
        return None, short_name(student)
    size = {"keep": int(layers[1])} if layers else {"params": student.upper()}
    name = f"{layers[1]}-layers" if layers else student.upper()
    return {"type": "depth", **size, "by": "block_influence"}, name


def short_name(model: str) -> str:
    """The last part of a model's path, as a folder may be called.

    Example:
        >>> short_name("Qwen/Qwen2.5-7B-Instruct")
        'Qwen2.5-7B-Instruct'
    """
    return re.sub(r"[^\w.-]+", "-", Path(model).name) or "model"
