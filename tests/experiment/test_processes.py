"""The command as schedulers treat it: several ranks, killed, stopped, resumed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.commands.processes import Command
from tests.experiment.tiny_run import steps_of, write_recipe

pytestmark = pytest.mark.slow
PATIENCE_S = 300


def start(folder, *arguments, launcher=()):
    environment = {**os.environ, "LIMBECK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "limbeck", "distill", "recipe.yaml", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    told, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, told
    return told


def run(folder, *arguments):
    """The same as `start`, without the seconds that imports take."""
    return Command("distill", "recipe.yaml", *arguments, cwd=folder)


def is_running(process):
    return process.is_running if isinstance(process, Command) else process.poll() is None


def wait_for_step(process, folder, step):
    """Until the log of a run says it has taken so many steps."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        path = folder / "run" / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        if not is_running(process):
            raise AssertionError(f"the process ended before step {step}")
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


def weights(folder):
    return (folder / "run" / "student" / "model.safetensors").read_bytes()


def whole(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    # 40 documents, a few rows: 60 steps of 4 rows cross the end of an epoch more than once.
    write_recipe(folder, optim={"steps": 60}, checkpoint={"every": 4}, evaluate={"every": 1000})
    return folder


def test_killed_three_times_and_resumed_the_student_is_the_same_to_the_byte(tmp_path):
    untouched = whole(tmp_path, "untouched")
    run(untouched).finish()
    killed = whole(tmp_path, "killed")
    dice = random.Random(os.getpid())
    at = sorted(dice.sample(range(6, 40), 3))
    for number, step in enumerate(at):
        process = run(killed, *(["--resume"] if number else []))
        wait_for_step(process, killed, step)
        process.kill()
    told = run(killed, "--resume").finish()
    assert "resumed at" in told
    assert "resumed at 0" not in told
    assert weights(killed) == weights(untouched), f"killed at {at}"
    assert [r["loss"] for r in steps_of(killed / "run")] == [
        r["loss"] for r in steps_of(untouched / "run")
    ]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_saves_and_resumes(tmp_path, sent, code):
    untouched, stopped = whole(tmp_path, "untouched"), whole(tmp_path, "stopped")
    run(untouched).finish()
    process = run(stopped)
    wait_for_step(process, stopped, 9)
    process.send(sent)
    assert "saved at step" in process.finish(code)
    run(stopped, "--resume").finish()
    assert weights(stopped) == weights(untouched)


def leave_the_pipe(folder, **settings):
    """`limbeck distill ... 2>&1 | head -1`: close the pipe while the run goes on; its exit code."""
    folder.mkdir()
    write_recipe(folder, **settings)
    process = start(folder)
    wait_for_step(process, folder, 1)
    process.stdout.close()
    return process.wait(timeout=PATIENCE_S)


def test_a_run_with_a_closed_pipe_saves_and_stops(tmp_path):
    """More steps than fit between two lines of progress: the run itself meets the closed pipe."""
    folder = tmp_path / "stopped"
    assert leave_the_pipe(folder, optim={"steps": 100_000}, evaluate={"every": 100_000}) == 143
    assert list((folder / "run" / "checkpoints").glob("step-*"))
    assert not (folder / "run" / "student").exists()


def test_a_pipe_closed_before_the_summary_leaves_a_finished_or_saved_run(tmp_path):
    """So few steps that the pipe is found closed at the end."""
    folder = tmp_path / "finished"
    assert leave_the_pipe(folder, optim={"steps": 3}) == 143
    finish(start(folder, "--resume"))
    assert (folder / "run" / "student" / "model.safetensors").is_file()


def test_two_ranks_take_the_steps_of_one_process(tmp_path):
    """Three rows a step on two ranks: scored tokens differ, and one micro-batch is empty."""
    folders = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write_recipe(
            folder,
            optim={"tokens_per_step": 96},
            memory={"micro_batch": 1},
            evaluate={"baseline": "cross_entropy"},
        )
        folders.append(folder)
    one, two = folders
    finish(start(one))
    finish(start(two, launcher=["-m", "torch.distributed.run", "--nproc-per-node", "2"]))
    for record, expected in zip(steps_of(two / "run"), steps_of(one / "run"), strict=True):
        for name in ("loss", "divergence", "cross_entropy", "grad_norm"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4)
        assert record["tokens"] == expected["tokens"]
    mine, theirs = (load_file(f / "run" / "student" / "model.safetensors") for f in (two, one))
    for name, value in theirs.items():
        assert (mine[name] - value).abs().max() < 1e-4, name
