"""Seconds and peak memory of forms; what they give is compared first."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from head.forms import FORMULAS, OURS, Form
from head.inputs import SHAPES, Inputs, make_inputs

LARGEST_DIFFERENCE = 2e-4
"""Relative, of gradients of the same formula in float32."""

Key = tuple[str, str]
"""A formula's name and a form's."""


def differences(
    inputs: Inputs, formula: str, chosen: Sequence[str]
) -> tuple[dict[str, Form], dict[str, float], dict[str, str]]:
    """Forms that run here, how far their gradients are from ours, and why others do not run."""
    runs: dict[str, Form] = {}
    apart: dict[str, float] = {}
    absent: dict[str, str] = {}
    reference: list[Tensor] = []
    for name, maker in FORMULAS[formula].forms.items():
        if name not in chosen:
            continue
        form = maker(inputs)
        try:
            gradients = form()  # also its first run: libraries are warm, compilers done
        except ImportError as error:
            absent[name] = " ".join(str(error).split())
            continue
        runs[name] = form
        if name == OURS:
            reference = gradients
        elif reference:
            pairs = zip(gradients, reference, strict=True)
            apart[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            if not apart[name] <= LARGEST_DIFFERENCE:
                raise SystemExit(f"{formula}: {name} is another loss: {apart[name]:.2e} from ours.")
    return runs, apart, absent


def timings(forms: dict[Key, Form], repeats: int) -> dict[Key, list[float]]:
    """Seconds of each run, the forms taking turns, every second round backwards."""
    seconds: dict[Key, list[float]] = {key: [] for key in forms}
    for turn in range(repeats):
        order = list(forms)
        for key in order if turn % 2 == 0 else reversed(order):
            started = time.perf_counter()
            forms[key]()
            seconds[key].append(time.perf_counter() - started)
            print(f"  {turn + 1}/{repeats} {key}: {seconds[key][-1]:.2f} s", flush=True)
    return seconds


def memory_of(formula: str, form: str, shape: str, tokens: int) -> float:
    """Peak MB of a form beyond inputs, the two gradients and the libraries; in a fresh process.

    The resident set's peak while it runs, less the resident set before.
    """
    maker = FORMULAS[formula].forms[form]
    inputs = make_inputs(SHAPES[shape], tokens)
    run = maker(inputs)
    # What is compiled is compiled for a size; what is not needs its libraries only.
    (run if "compiled" in form else maker(make_inputs(SHAPES["tiny"], 8)))()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as there before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident_mb("VmRSS")
    run()
    outputs = sum(4 * each.numel() for each in inputs[:2]) / 2**20
    return resident_mb("VmHWM") - before - outputs


def resident_mb(field: str) -> float:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its peak.

    Not `getrusage`, whose peak a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def medians(seconds: dict[Key, list[float]]) -> dict[Key, float]:
    return {key: statistics.median(each) for key, each in seconds.items()}
