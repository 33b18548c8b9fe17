"""Seconds of a contender's process since its start, from the events it wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]
"""See `Events`."""


@dataclass(frozen=True)
class Timeline:
    """Seconds since the process started; savings in between are not counted.

    Attributes:
        begin: When the first step began.
        steps: When each step ended.
        step_seconds: Median of a step.
        step_cpu_seconds: The same of all threads, which other jobs on the machine disturb less.
        student: When the final student was on the disk.
        end: When the process had ended.
        checkpoint: Of the time before `student`, what limbeck's checkpoint of the last step took.
        saving: What the savings in between took.
    """

    begin: float
    steps: list[float]
    step_seconds: float
    step_cpu_seconds: float
    student: float
    end: float
    checkpoint: float
    saving: float

    def at(self, step: int) -> float:
        """When the student of a step was there, 0 for none taken; the final one on the disk."""
        return self.student if step == len(self.steps) else [self.begin, *self.steps][step]


def read_events(path: Path) -> list[Event]:
    """The events of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeline(
    events: Sequence[Event], savings: Mapping[int, float], started: float, ended: float
) -> Timeline:
    """The timeline of a process.

    Args:
        savings: Seconds of each saving in between, by the step after which it was made.
        started: The clock when the process was started.
        ended: The clock when it had ended.
    """
    at = {(event["kind"], event["step"]): event for event in events}
    taken = [at["begin", 0], *(event for event in events if event["kind"] == "step")]
    saving = sum(savings.values())

    def since_start(event: Event) -> float:
        before = sum(seconds for step, seconds in savings.items() if step < event["step"])
        return float(event["time"]) - started - before

    seconds = [since_start(event) for event in taken]
    pairs = [(a, b) for a, b in pairwise(taken) if a["step"] not in savings]
    return Timeline(
        begin=seconds[0],
        steps=seconds[1:],
        step_seconds=statistics.median(after - before for before, after in pairwise(seconds)),
        step_cpu_seconds=statistics.median(float(b["cpu"] - a["cpu"]) for a, b in pairs),
        student=float(at["student", 0]["time"]) - started - saving,
        end=ended - started - saving,
        checkpoint=float(at["end", 0]["time"] - taken[-1]["time"]) if ("end", 0) in at else 0.0,
        saving=saving,
    )


def peer_savings(events: Sequence[Event]) -> dict[int, float]:
    """Savings that a peer timed itself."""
    return {event["step"]: event["seconds"] for event in events if event["kind"] == "saved"}


def limbeck_savings(events: Sequence[Event], points: Sequence[int]) -> dict[int, float]:
    """What passed between steps besides the steps themselves, where a checkpoint was written."""
    steps = {event["step"]: event for event in events if event["kind"] == "step"}

    def between(step: int) -> float:
        before, after = steps[step], steps[step + 1]
        passed = float(after["time"] - before["time"])
        return passed - float(after["seconds"] - before["seconds"])

    return {step: between(step) for step in points[:-1]}
