"""What is compared: contenders, the size of the job, and the order of the cells."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from student_table.plan import OTHER_RATE, ROW, STEP

QUARTERS = 4
"""Students are measured before the first step and after each quarter of the steps."""
WARMUP = 8
"""One step of this many warms up."""
TRL = "trl"


@dataclass(frozen=True)
class Arm:
    """A contender with its choices.

    Attributes:
        label: In the tables and the figure.
        kind: `trl`, `plain` or `limbeck`.
        by: How limbeck chooses the layers. Those of the peers are evenly spaced.
        divisor: What the number of steps is divided by.
    """

    label: str
    kind: str
    by: str = "even"
    divisor: int = 1


ARMS = {
    TRL: Arm("TRL, DistillationTrainer", TRL),
    "plain": Arm("plain loop", "plain"),
    "even": Arm("limbeck, even", "limbeck"),
    "block_influence": Arm("limbeck, block influence", "limbeck", "block_influence"),
    "third": Arm("limbeck, block influence, 1/3 of the tokens", "limbeck", "block_influence", 3),
    "loss": Arm("limbeck, loss", "limbeck", "loss"),
}
DEFAULT_ARMS = [name for name in ARMS if name != "loss"]


@dataclass(frozen=True)
class Job:
    """The job of every contender; cells of another job are not mixed with its own.

    Attributes:
        teacher: The name of its folder.
        layers: Of the student.
        tokens: Positions of training.
        row: Positions of a row.
        rows: Rows of an optimizer step.
        held_out: Most positions of held-out text.
        learning_rate: At its peak.
        threads: Of each process.
        dtype: What all compute in, and the teacher's format; students are stored in float32.
    """

    teacher: str
    layers: int
    tokens: int
    row: int
    rows: int
    held_out: int
    learning_rate: float
    threads: int
    dtype: str

    def steps(self, arm: Arm) -> int:
        """Optimizer steps of an arm, at least 1."""
        return max(self.tokens // (self.row * self.rows) // arm.divisor, 1)

    def save_every(self, arm: Arm) -> int:
        """Steps between students that are measured."""
        return max(self.steps(arm) // QUARTERS, 1)

    def points(self, arm: Arm) -> list[int]:
        """Steps after which a student is measured: none, each quarter of them, and all."""
        steps, every = self.steps(arm), self.save_every(arm)
        return [*range(0, steps, every), steps]

    def warmup_steps(self, arm: Arm) -> int:
        """Steps from 0 to the peak of the learning rate."""
        return self.steps(arm) // WARMUP


@dataclass(frozen=True)
class Cell:
    """One contender's job with one order of the rows."""

    arm: str
    seed: int


def options(description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", help="a folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--layers", type=int, default=24, help="of the student")
    parser.add_argument("--tokens", type=int, default=60 * STEP, help="positions of training")
    parser.add_argument("--row", type=int, default=ROW, help="positions of a row")
    parser.add_argument("--rows", type=int, default=STEP // ROW, help="rows of a step")
    parser.add_argument("--held-out", type=int, default=8000, help="positions, at most")
    parser.add_argument("--learning-rate", type=float, default=OTHER_RATE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=ARMS)
    parser.add_argument("--small", action="store_true", help="4 tiny steps, to try the script")
    parser.add_argument("--tables", action="store_true", help="measure nothing, only write")
    parser.add_argument("--work", type=Path, default=Path("runs/job"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.row, chosen.held_out = 32, 500
        chosen.tokens = 4 * chosen.row * chosen.rows
    if TRL in chosen.arms and find_spec("trl") is None and not chosen.tables:
        print("TRL cannot be imported and is left out", flush=True)
        chosen.arms = [name for name in chosen.arms if name != TRL]
    return chosen


def job_of(chosen: argparse.Namespace) -> Job:
    """The job that a command line describes."""
    fields = {name: vars(chosen)[name] for name in Job.__dataclass_fields__ if name != "teacher"}
    return Job(teacher=Path(chosen.teacher).name, **fields)


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """Every cell; each seed takes the contenders in the reverse order of the seed before."""
    for number, seed in enumerate(chosen.seeds):
        for arm in chosen.arms if number % 2 == 0 else reversed(chosen.arms):
            yield Cell(arm, seed)


def settings_of(job: Job) -> dict[str, Any]:
    """What a cell's figures depend on besides the cell."""
    return asdict(job)
