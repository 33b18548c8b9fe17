"""Progress display of a recording."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class RecordingProgress:
    """A progress bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = self._scored = self._bytes = 0
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("recording"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("recording", total=total, numbers="")
            self._bar.start()

    def advance(self, positions: int) -> None:
        """Count positions that were read."""
        self._done += positions
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, numbers=self._numbers())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def finished(self, shard: int, num_shards: int, scored: int, size_bytes: int) -> None:
        """Report a published shard."""
        self._scored += scored
        self._bytes += size_bytes
        self._say(f"shard {shard + 1}/{num_shards}  {self._numbers()}")

    def close(self) -> None:
        """Stop the bar; its last state stays visible."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self) -> None:
        self._last_line = time.monotonic()
        left = (self._total - self._done) * self._seconds() / max(self._done, 1)
        self._say(f"recorded {self._done:,}/{self._total:,}  {self._numbers()}  {left:,.0f} s left")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _numbers(self) -> str:
        per_token = f"  {self._bytes / self._scored:.1f} bytes/token" if self._scored else ""
        return f"{self._done / self._seconds():,.0f} tokens/s{per_token}"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)
