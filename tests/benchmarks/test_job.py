"""The comparison of whole jobs: its arithmetic, and a tiny job of a plain loop and of limbeck."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.studies.test_studies import write_teacher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def event(kind, step, time, seconds=0.0, cpu=0.0):
    return {"kind": kind, "step": step, "time": time, "seconds": seconds, "cpu": cpu}


def test_intermediate_savings_are_not_counted_and_the_last_one_is(module):
    events = [
        event("begin", 0, 105.0),
        event("step", 1, 107.0, cpu=2.0),
        event("saved", 1, 110.0, seconds=3.0),
        event("step", 2, 112.0, cpu=7.0),
        event("student", 0, 116.0),
    ]
    timelines = module("job_table.timeline")
    found = timelines.timeline(events, timelines.peer_savings(events), 100.0, 117.0)
    assert found.begin == 5.0
    assert found.steps == [7.0, 9.0]
    assert found.step_seconds == 2.0
    assert found.step_cpu_seconds == 2.0  # that of the step after a saving holds the saving
    assert (found.student, found.end, found.saving) == (13.0, 14.0, 3.0)
    assert [found.at(step) for step in (0, 1, 2)] == [5.0, 7.0, 13.0]


def test_a_checkpoint_is_what_passed_between_steps_besides_the_steps(module):
    events = [
        event("begin", 0, 10.0),
        event("step", 1, 12.0, seconds=2.0),
        event("step", 2, 19.0, seconds=4.0),
        event("step", 3, 21.0, seconds=6.0),
        event("end", 0, 27.0),
        event("student", 0, 28.0),
    ]
    timelines = module("job_table.timeline")
    savings = timelines.limbeck_savings(events, [1, 3])
    assert savings == {1: 5.0}
    found = timelines.timeline(events, savings, 9.0, 30.0)
    assert found.steps == [3.0, 5.0, 7.0]
    assert (found.checkpoint, found.student) == (6.0, 14.0)


def test_a_kl_is_reached_between_two_points_or_within_the_tolerance(module):
    seconds_until = module("job_table.results").seconds_until
    curve = [(10.0, 2.0), (20.0, 1.0), (40.0, 0.9)]
    assert seconds_until(curve, 1.5) == 15.0
    assert seconds_until(curve, 2.5) == 10.0
    assert seconds_until(curve, 0.8) is None
    assert seconds_until(curve, 0.8999) == 40.0


def test_quarters_after_which_no_student_was_saved_are_dashes(module, tmp_path):
    plan, results = module("job_table.plan"), module("job_table.results")
    job = plan.Job("teacher", 2, 10 * 64, 32, 2, 100, 1e-3, 1, "float32")
    assert job.points(plan.ARMS["even"]) == [0, 2, 4, 6, 8, 10]
    times = dict.fromkeys(["begin", "step_seconds", "step_cpu_seconds", "student", "end"], 1.0)
    points = [{"step": s, "seconds": s, "forward_kl": 9.0 - s} for s in range(0, 12, 2)]
    cell = {"arm": "even", "seed": 1, "points": points, **times}
    cell["settings"] = plan.settings_of(job)
    (tmp_path / "cells.jsonl").write_text(json.dumps(cell))
    line = results.row(results.Cells(job, tmp_path), "even")
    assert line.endswith("| 9.000 | - | - | - | -1.000 | - | - |")


@pytest.mark.long
def test_a_plain_loop_and_limbeck_with_the_same_layers_reach_the_same_kl(tmp_path):
    write_teacher(tmp_path / "teacher")
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "job.py"), "--small"]
    command += ["--teacher", str(tmp_path / "teacher"), "--layers", "2", "--threads", "1"]
    command += ["--seeds", "1", "--arms", "plain", "even", "--work", str(tmp_path / "work")]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "LIMBECK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "work" / "cells.jsonl").read_text().splitlines()
    plain, even = ([p["forward_kl"] for p in json.loads(line)["points"]] for line in lines)
    assert len(plain) == 5
    assert len(set(plain)) == 5
    # limbeck keeps the documents of a row apart, and the plain loop does not.
    assert even == pytest.approx(plain, rel=1e-3)
    assert "\n| limbeck, even | 4 | " in (tmp_path / "job.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (again.returncode, again.stdout) == (0, "")  # finished cells are not run again
