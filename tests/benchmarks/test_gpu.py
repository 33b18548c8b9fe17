"""What `make gpu` runs after its tests, at the smallest size on a CPU."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def make_gpu(*options: object) -> subprocess.CompletedProcess[str]:
    """The last command of `make gpu` with other options, in an environment without a path."""
    inherited = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    plain = {name: value for name, value in os.environ.items() if name not in inherited}
    dry = ["make", "-n", "gpu", f"VENV={sys.prefix}"]
    shown = subprocess.run(dry, check=True, cwd=ROOT, env=plain, capture_output=True, text=True)
    command, _ = shown.stdout.splitlines()[-1].split(" --out ")
    command = shlex.join([*shlex.split(command), *map(str, options)])
    return subprocess.run(
        command, shell=True, check=False, cwd=ROOT, env=plain, capture_output=True, text=True
    )


def test_make_gpu_finds_what_it_imports():
    done = make_gpu("--help")
    assert done.returncode == 0, done.stderr
    assert "--parts" in done.stdout


AN_END = """
import sys
sys.path.insert(0, "benchmarks")
import gpu, torch
gpu.PARTS["first"] = "First", lambda options, _: [f"{torch.get_num_threads()} threads"]
gpu.PARTS["second"] = "Second", lambda options, _: sys.exit(3)
sys.argv += ["--device", "cpu", "--parts", "first", "second", "--out", sys.argv[1]]
del sys.argv[1]
gpu.main()
"""


def test_a_part_that_ends_the_process_leaves_what_others_found(tmp_path):
    out = tmp_path / "gpu.md"
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", AN_END, out],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "## First\n\n2 threads" in out.read_text()
    assert "## First\n\n2 threads" in done.stdout


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
    options = ["--device", "cpu", "--small", "--repeats", "1", "--parts", part, "--out", out]
    done = make_gpu(*options)
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
