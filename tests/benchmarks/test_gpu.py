"""What `make gpu` runs after its tests, at the smallest size on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "head",
        "store",
        "gradients",
        pytest.param("steps", marks=pytest.mark.long),
        pytest.param("resume", marks=pytest.mark.long),
    ],
)
def test_every_part_runs_on_a_cpu(part, tmp_path):
    out = tmp_path / "gpu.md"
    command = [sys.executable, "-W", "ignore", SCRIPT, "--device", "cpu", "--small"]
    command += ["--repeats", "1", "--parts", part, "--out", out]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    failed = [line for line in out.read_text().splitlines() if line.startswith("did not run")]
    assert not failed
    wanted = {
        "head": "| limbeck, top-64 and tail |",
        "steps": "Plan of limbeck's step: ",
        "store": "| top-64 and tail |",
        "gradients": "the largest relative difference is 0.0e+00",
        "resume": "resumed: the same bytes",
    }
    assert wanted[part] in out.read_text()
