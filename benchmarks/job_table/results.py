"""Finished cells on disk, and what they come to: a table and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from job_table.plan import ARMS, QUARTERS, TRL, Cell, Job, settings_of
from job_table.processes import Done
from limbeck.files import write_text

NOTHING = "-"
TOLERANCE = 5e-4
"""Nats that two KL may differ by to count as one; tables show thousandths."""
Point = tuple[float, float]
"""Seconds since the process started, and KL in nats a token."""


class Cells:
    """The finished cells of one job, a line each in WORK/cells.jsonl."""

    def __init__(self, job: Job, work: Path) -> None:
        self.job = job
        self._path = work / "cells.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        found = [json.loads(line) for line in lines]
        self.all: list[dict[str, Any]] = [c for c in found if c["settings"] == settings_of(job)]

    def has(self, cell: Cell) -> bool:
        """Whether a cell is there."""
        return any((c["arm"], c["seed"]) == (cell.arm, cell.seed) for c in self.all)

    def add(self, cell: Cell, done: Done, forward_kl: Mapping[int, float]) -> None:
        """Keep a cell that was just measured."""
        timeline = done.timeline
        points = [
            {"step": step, "seconds": timeline.at(step), "forward_kl": value}
            for step, value in forward_kl.items()
        ]
        found = {
            **asdict(cell),
            "points": points,
            "layers": done.layers,
            **asdict(timeline),
            "settings": settings_of(self.job),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(found)}\n")
        self.all.append(found)

    def of(self, arm: str) -> list[dict[str, Any]]:
        """Cells of an arm, one for each seed."""
        return [cell for cell in self.all if cell["arm"] == arm]

    def median(self, arm: str, figure: Callable[[Mapping[str, Any]], float]) -> float:
        """Median over the seeds."""
        return statistics.median(figure(cell) for cell in self.of(arm))

    def curve(self, arm: str) -> list[Point]:
        """Medians over the seeds of an arm's points, in the order of the steps."""
        columns = zip(*(cell["points"] for cell in self.of(arm)), strict=True)
        return [
            (
                statistics.median(point["seconds"] for point in column),
                statistics.median(point["forward_kl"] for point in column),
            )
            for column in columns
        ]


def seconds_until(curve: Sequence[Point], forward_kl: float) -> float | None:
    """When a curve first reaches a KL, by linear interpolation between its points.

    KL falls fastest at first, so that a line between two points is above the curve, and reaches it
    late.

    Returns:
        The seconds; None where no point is as low, or within `TOLERANCE` of it.
    """
    near = [(at, forward_kl if abs(kl - forward_kl) < TOLERANCE else kl) for at, kl in curve]
    if near[0][1] <= forward_kl:
        return near[0][0]
    for (before, higher), (after, lower) in pairwise(near):
        if lower <= forward_kl:
            return before + (higher - forward_kl) / (higher - lower) * (after - before)
    return None


def write_results(cells: Cells, arms: Sequence[str], out: Path) -> None:
    """job.md and job.svg, from the cells that are there."""
    there = [arm for arm in arms if cells.of(arm)]
    if not there:
        return
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*heading(cells, there), *table(cells, there), *own_work(cells, there)])
    write_text(out / "job.md", f"{text}\n")
    draw(cells, there, out / "job.svg")


def heading(cells: Cells, arms: Sequence[str]) -> list[str]:
    """What was measured."""
    job = cells.job
    seeds = sorted({cell["seed"] for cell in cells.all})
    libraries = ["torch", "transformers", *(["trl"] if TRL in arms else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return [
        f"# The whole job on a CPU: {job.teacher} into {job.layers} layers, {job.tokens:,} tokens",
        "",
        f"Steps of {job.rows} rows of {job.row} positions, forward KL at T = 1, AdamW at "
        f"{job.learning_rate:g} with a cosine, {job.dtype}, {job.threads} threads; {versions}. "
        "Every contender runs in a fresh process; seconds are from its start. Medians over seeds "
        f"{', '.join(map(str, seeds))}. KL to the teacher on held-out text, in nats a token. "
        "Saving students in between is not counted.",
        "",
    ]


def table(cells: Cells, arms: Sequence[str]) -> list[str]:
    """Times and KL of every arm."""
    quarters = [f"KL at {part}/{QUARTERS}" for part in range(1, QUARTERS)]
    columns = [
        "", "steps", "s before the first step", "s a step", "CPU s a step",
        "s until the student is saved",
        "s until the process ends", "KL before", *quarters, "KL at the end",
        "s until TRL's final KL", "TRL's s until its student / these",
    ]  # fmt: skip
    rows = [row(cells, arm) for arm in arms]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows]


def row(cells: Cells, arm: str) -> str:
    """One arm's row."""
    steps, curve = cells.job.steps(ARMS[arm]), cells.curve(arm)
    at: dict[float, Point] = dict(zip(cells.job.points(ARMS[arm]), curve, strict=True))
    points = [at.get(part * steps / QUARTERS) for part in range(QUARTERS + 1)]
    kls = [NOTHING if point is None else f"{point[1]:.3f}" for point in points]
    figures = [
        cells.median(arm, lambda cell: cell["begin"]),
        cells.median(arm, lambda cell: cell["step_seconds"]),
        cells.median(arm, lambda cell: cell["step_cpu_seconds"]),
        cells.median(arm, lambda cell: cell["student"]),
        cells.median(arm, lambda cell: cell["end"]),
    ]
    digits = [1, 2, 2, 0, 0]
    times = [f"{value:.{n}f}" for value, n in zip(figures, digits, strict=True)]
    return f"| {' | '.join([ARMS[arm].label, str(steps), *times, *kls, *reaching(cells, curve)])} |"


def reaching(cells: Cells, curve: Sequence[Point]) -> list[str]:
    """Seconds until TRL's final KL, and how often they fit into TRL's."""
    if not cells.of(TRL):
        return [NOTHING, NOTHING]
    seconds, forward_kl = cells.curve(TRL)[-1]
    reached = seconds_until(curve, forward_kl)
    if reached is None:
        return ["not reached", NOTHING]
    return [f"{reached:.0f}", f"{seconds / reached:.2f}"]


def own_work(cells: Cells, arms: Sequence[str]) -> list[str]:
    """What limbeck's command does that the others do not, and cannot be switched off."""
    ours = [arm for arm in arms if ARMS[arm].kind == "limbeck"]
    if not ours:
        return []
    rows = []
    for arm in ours:
        checkpoint = cells.median(arm, lambda cell: cell["checkpoint"])
        report = cells.median(arm, lambda cell: cell["end"] - cell["student"])
        student = cells.median(arm, lambda cell: cell["student"] - cell["checkpoint"])
        rows.append(f"| {ARMS[arm].label} | {checkpoint:.1f} | {report:.1f} | {student:.0f} |")
    return [
        "",
        "limbeck's command also writes a checkpoint of the last step, with the optimizer's state, "
        "before it saves the student, and a report after that. Neither can be switched off; the "
        "seconds above contain them.",
        "",
        "| | s of the checkpoint | s after the student is saved | "
        "s until the student is saved, without the checkpoint |",
        "|---|---|---|---|",
        *rows,
    ]


def draw(cells: Cells, arms: Sequence[str], path: Path) -> None:
    """KL against seconds since the start, a line an arm."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "job"}):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for arm in arms:
            seconds, kls = zip(*cells.curve(arm), strict=True)
            axes.plot(seconds, kls, "-o", markersize=4, linewidth=1, label=ARMS[arm].label)
        if cells.of(TRL):
            axes.axhline(cells.curve(TRL)[-1][1], color="#888", linestyle=":", linewidth=1)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the process started")
        axes.set_ylabel("held-out forward KL to the teacher, nats a token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
