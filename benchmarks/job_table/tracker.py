"""A plugin of limbeck: a tracker that writes when steps ended."""

from __future__ import annotations

from pathlib import Path

from job_table.events import Events
from limbeck.train.metrics import Record
from limbeck.train.trackers import trackers


@trackers.register("events")
class EventSink:
    """Writes EVENTS, a file of `Events`."""

    def __init__(self, folder: Path, *, path: str) -> None:
        """
        Args:
            folder: Of the run.
            path: The file.
        """
        del folder
        self._events = Events(Path(path))

    def begin(self, step: int, steps: int) -> None:
        """Training begins."""
        del steps
        self._events.add("begin", step)

    def write(self, record: Record) -> None:
        """Write the end of a step; other records are nothing to this tracker."""
        if record["kind"] == "step":
            self._events.add("step", record["step"], record["seconds"])

    def close(self) -> None:
        """Training ends, its last checkpoint is written."""
        self._events.add("end")
