"""Running one contender's job in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job_table.peer import PeerPlan
from job_table.plan import ARMS, Arm, Cell, Job
from job_table.timeline import (
    Timeline,
    limbeck_savings,
    peer_savings,
    read_events,
    timeline,
)
from limbeck.data import corpus_path
from limbeck.students.depth import even_layers

BENCHMARKS = Path(__file__).parents[1]
MODULES = {"trl": "job_table.trl_job", "plain": "job_table.plain_job"}
IMPORTED = {**MODULES, "limbeck": "limbeck.commands.distill"}


@dataclass(frozen=True)
class Done:
    """A job that has run.

    Attributes:
        folder: Its files.
        layers: Layers of the teacher that its student keeps.
    """

    folder: Path
    timeline: Timeline
    layers: list[int]


@dataclass(frozen=True)
class Runner:
    """Starts jobs, one at a time.

    Attributes:
        teacher: A folder.
        num_layers: Of the teacher.
        work: Folder of the jobs' folders.
    """

    job: Job
    teacher: Path
    num_layers: int
    work: Path

    def warm_up(self, arms: Sequence[str]) -> None:
        """Import what the jobs import, so that none of them reads or compiles a file first."""
        for kind in sorted({ARMS[name].kind for name in arms}):
            command = [sys.executable, "-W", "ignore", "-c", f"import {IMPORTED[kind]}"]
            call(command, self._environment(self.work), self.work / f"import-{kind}.txt")

    def run(self, cell: Cell, starts: Sequence[int]) -> Done:
        """One job.

        Args:
            starts: First tokens of the rows, for a peer.
        """
        arm, folder = ARMS[cell.arm], (self.work / f"{cell.arm}-{cell.seed}").absolute()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if arm.kind == "limbeck":
            path = folder / "recipe.yaml"
            path.write_text(json.dumps(self._recipe(arm, cell.seed, folder), indent=1))
            words = ["limbeck", "distill", str(path)]
        else:
            path = folder / "plan.json"
            path.write_text(json.dumps(asdict(self._plan(arm, starts, folder))))
            words = [MODULES[arm.kind], str(path)]
        command = [sys.executable, "-W", "ignore", "-m", *words]
        os.sync()  # what the job before has written must not be written out during this one
        started, ended = call(command, self._environment(folder), folder / "output.txt")
        events = read_events(folder / "events.jsonl")
        if arm.kind != "limbeck":
            layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
            return Done(folder, timeline(events, peer_savings(events), started, ended), layers)
        # The run writes this file when its student is on the disk; it measures nothing here.
        written = (folder / "run" / "scores.json").stat().st_mtime
        events.append({"kind": "student", "step": 0, "time": written})
        savings = limbeck_savings(events, self.job.points(arm)[1:])
        facts = json.loads((folder / "run" / "provenance.json").read_text(encoding="utf-8"))
        layers = facts["student"]["layers_kept"]
        return Done(folder, timeline(events, savings, started, ended), layers)

    def _plan(self, arm: Arm, starts: Sequence[int], folder: Path) -> PeerPlan:
        job = self.job
        return PeerPlan(
            teacher=str(self.teacher),
            text=str(corpus_path("train")),
            starts=list(starts),
            layers=list(even_layers(job.layers, self.num_layers)),
            row=job.row,
            rows=job.rows,
            steps=job.steps(arm),
            warmup_steps=job.warmup_steps(arm),
            learning_rate=job.learning_rate,
            dtype=job.dtype,
            save_at=job.points(arm)[1:-1],
            folder=str(folder),
        )

    def _recipe(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        """A recipe that measures nothing; checkpoints hold the students in between."""
        job = self.job
        events = {"type": "events", "path": str(folder / "events.jsonl")}
        return {
            "teacher": {"type": "online", "path": str(self.teacher), "dtype": job.dtype},
            "student": {"type": "depth", "keep": job.layers, "by": arm.by},
            "data": {
                "type": "text",
                "path": str(corpus_path("train")),
                "sequence_length": job.row,
            },
            "objective": {"alpha": 1.0, "temperature": 1.0, "divergence": "forward_kl"},
            "optim": {
                "learning_rate": job.learning_rate,
                "steps": job.steps(arm),
                "tokens_per_step": job.row * job.rows,
                "warmup_steps": job.warmup_steps(arm),
            },
            "checkpoint": {
                "every": job.save_every(arm),
                "keep": len(job.points(arm)) - 1,
                "keep_best": False,
            },
            "parallel": {"compute_dtype": job.dtype},
            "plugins": [str(BENCHMARKS / "job_table" / "tracker.py")],
            "track": [events],
            "output": str(folder / "run"),
            "device": "cpu",
            "seed": seed,
        }

    def _environment(self, folder: Path) -> dict[str, str]:
        """The same threads for all; no tokenised text is left from a job before."""
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(self.job.threads)
        return {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "RAYON_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "LIMBECK_CACHE": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(paths),
        }


def call(command: Sequence[str], environment: dict[str, str], output: Path) -> tuple[float, float]:
    """Run a process; the clock before and after.

    Raises:
        SystemExit: It failed.
    """
    with output.open("w", encoding="utf-8") as file:
        started = time.time()
        done = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
        ended = time.time()
    if done.returncode != 0:
        tail = "\n".join(output.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} failed, see {output}:\n{tail}")
    return started, ended
