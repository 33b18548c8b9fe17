"""The row kernels compiled for an H200 (sm_90a), which needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not TOOL.is_file(), reason="this Triton has no cuobjdump"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="compiled and run by the other tests"),
]

SCRIPT = Path(__file__).parent / "compile_row_kernel.py"
QUICK = ["forward_kl", "forward_kl T=2", "reverse_kl capped", "lk_kl", "sparse lk_kl"]
EVERY = [
    *(f"{name} T=0.7" for name in ("forward_kl", "reverse_kl", "jensen_shannon", "lk")),
    *("reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "total_variation"),
    *("lk", "lk_kl T=2", "lk_kl capped", "sparse forward_kl", "sparse lk capped T=2"),
    *("sparse samples", "sparse jensen_shannon T=0.7", "forward_kl float32", "lk_kl float32"),
]


@pytest.mark.parametrize(
    "variants", [QUICK, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_nothing_spills_and_every_access_to_logits_is_16_bytes_wide(variants, tmp_path):
    """At 151,665 tokens, whose rows no 16-byte access fits unless they are padded."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *variants]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert list(facts) == variants
    for name, each in facts.items():
        assert each["spilled_bytes"] == 0, (name, each)
        assert each["registers"] <= 128, (name, each)  # two rows at once, at least
        assert each["float64_instructions"] == 0, (name, each)
        # Of each loop over blocks and for each array: one access, or two of float32.
        assert each["wide_loads"] == each["expected_loads"], (name, each)
        assert each["wide_stores"] == each["expected_stores"], (name, each)
        # The row's weight, target and its logit; the kept tokens and their log-probabilities.
        assert each["narrow_loads"] <= (12 if name.startswith("sparse") else 3), (name, each)
