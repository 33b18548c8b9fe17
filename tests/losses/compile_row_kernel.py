"""Prints registers, spills and widths of accesses of row kernels compiled for sm_90a, as JSON.

    python compile_row_kernel.py "forward_kl T=2" "sparse lk_kl capped" ...

A process of its own, because Triton either interprets or compiles what it has imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from limbeck.losses.head.row_kernel import launch
from limbeck.losses.logit_transforms import CAPPED, Elementwise

VOCABULARY, PITCH, ROWS, KEPT = 151_665, 151_680, 4, 64
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class H200:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def task_of(variant: str) -> launch.RowTask:
    words = variant.split()
    dtype = torch.float32 if "float32" in words else torch.bfloat16
    transform = Elementwise(CAPPED, 1 / 30, 30.0) if "capped" in words else Elementwise()
    logits = torch.empty(ROWS, PITCH, dtype=dtype)[:, :VOCABULARY]
    teacher: launch.DenseTeacher | launch.SparseTeacher
    teacher = launch.DenseTeacher(torch.empty_strided(logits.shape, logits.stride(), dtype=dtype),
                                  transform)  # fmt: skip
    if "sparse" in words:
        ids = torch.zeros(ROWS, KEPT, dtype=torch.int64)
        logprobs = torch.zeros(ROWS, KEPT + 1)
        teacher = launch.SparseTeacher(ids, logprobs, are_shares="samples" in words)
    temperatures = [float(word[2:]) for word in words if word.startswith("T=")]
    return launch.RowTask(
        logits=logits,
        transform=transform,
        teacher=teacher,
        targets=torch.zeros(ROWS, dtype=torch.int64),
        weights=torch.ones(ROWS),
        divergence=(next((w for w in words if w in launch.ROW_DIVERGENCES), ""), (0.1, 0.2)),
        temperature=temperatures[0] if temperatures else 1.0,
        soft_weight=0.5,
        hard_weight=0.5,
        gradient=True,
    )


def facts_of(variant: str) -> dict[str, int]:
    task = task_of(variant)
    call = launch.kernel_call(task, torch.zeros(ROWS), torch.zeros(ROWS))
    compiled = call.kernel.warmup(*call.arguments, grid=(ROWS,), num_warps=launch.WARPS)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOL, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def used(kind: str) -> int:
        return sum(int(number) for number in re.findall(rf"\b{kind}:(\d+)", usage))

    loads, stores = (re.findall(rf"{kind}\.global\S*", ptx) for kind in ("ld", "st"))
    wide_loads, wide_stores = (sum(".v4.b32" in each for each in kind) for kind in (loads, stores))
    # Whole blocks and the rest; the gradient's pass writes, and so does a row of weight 0.
    is_sparse = isinstance(task.teacher, launch.SparseTeacher)
    passes, arrays = (2, 1) if is_sparse else (3, 2)
    accesses = 2 if task.logits.dtype == torch.float32 else 1
    return {
        "registers": used("REG"),
        "spilled_bytes": used("STACK") + used("LOCAL"),
        "wide_loads": wide_loads,
        "expected_loads": 2 * passes * arrays * accesses,
        "wide_stores": wide_stores,
        "expected_stores": 3 * accesses,
        "narrow_loads": len(loads) - wide_loads,
        "float64_instructions": ptx.count(".f64"),
    }


if __name__ == "__main__":
    driver.set_active(H200())
    print(json.dumps({variant: facts_of(variant) for variant in sys.argv[1:]}))  # noqa: T201
