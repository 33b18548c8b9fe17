"""Whether a CPU computes faster in bfloat16."""

from __future__ import annotations

import time

import torch

UNITS = ("amx_bf16", "avx512_bf16")
"""Names of the units of a CPU that multiply bfloat16 matrices."""

SHAPE = (512, 576, 1536)
"""Of the product that is timed: a micro-batch through a layer of a small model."""

WORTH_IT = 1.5
"""How many times as fast bfloat16 must be to be mentioned."""

IN_BFLOAT16 = ("parallel.compute_dtype=bfloat16", "teacher.dtype=bfloat16")
"""What computes both models in it; the student's weights, gradients and losses stay in float32."""


def bfloat16_gain() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16 matrices; 0 without a unit.

    The best of five products each, some tens of milliseconds.
    """
    if not any(torch.cpu.get_capabilities().get(unit) for unit in UNITS):
        return 0.0
    return product_seconds(torch.float32) / product_seconds(torch.bfloat16)


def product_seconds(dtype: torch.dtype) -> float:
    """Seconds of a matrix product on the CPU."""
    rows, inner, columns = SHAPE
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def number_format_notes(gain: float) -> list[str]:
    """What to set on a CPU whose bfloat16 products are so many times as fast."""
    if gain < WORTH_IT:
        return []
    return [
        f"This CPU multiplies matrices {gain:.1f} times as fast in bfloat16 as in float32, and the "
        f"run computes in float32. Try {' and '.join(IN_BFLOAT16)}; "
        "weights, gradients and losses stay in float32."
    ]
