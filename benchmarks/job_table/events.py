"""When a contender's process began and ended its steps, by the clock that its parent reads too."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Events:
    """A file with one event a line, in JSON, flushed after each.

    Kinds: `begin` before the first step; `step` after each; `saved` after the student of a step
    was saved in between; `student` when the final one is on the disk; `end`, after which nothing
    is trained. Each has the clock, and seconds of all threads of the process so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def add(self, kind: str, step: int = 0, seconds: float = 0.0) -> None:
        """Write an event that happened now.

        Args:
            kind: See the class.
            step: The step it belongs to.
            seconds: How long a saving took; or, of limbeck's steps, all of them together.
        """
        clocks = {"time": time.time(), "cpu": time.process_time()}
        event = {"kind": kind, "step": step, "seconds": seconds, **clocks}
        self._file.write(f"{json.dumps(event)}\n")
        self._file.flush()
