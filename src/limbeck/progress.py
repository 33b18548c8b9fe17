"""Progress of long work."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class ProgressBar:
    """A progress bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        """
        Args:
            label: What is done, as `recording`.
            total: Units of the work.
        """
        self._console, self._label, self._total = console, label, total
        self._done = 0
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(label),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(label, total=total, numbers="")
            self._bar.start()

    @property
    def seconds(self) -> float:
        """Since the start, above 0."""
        return max(time.monotonic() - self._began, 1e-9)

    def advance(self, units: int, numbers: str) -> None:
        """Count finished units.

        Args:
            numbers: Speed and the like, shown beside the bar.
        """
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, numbers=numbers)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = (self._total - self._done) * self.seconds / max(self._done, 1)
            counted = f"{self._label} {self._done:,}/{self._total:,}"
            self.say(f"{counted}  {numbers}  {left:,.0f} s left")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar; its last state stays visible."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ProgressLines:
    """Progress of reading a text, whose length is not known: a plain line every few seconds."""

    def __init__(self, console: Console, label: str) -> None:
        """
        Args:
            label: What is done, as `tokenising`.
        """
        self._console, self._label = console, label
        self._began = self._last_line = time.monotonic()

    def __call__(self, rows: int, tokens: int) -> None:
        """Say how much has been read since the start, unless a line was printed just now."""
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = tokens / (now - self._began)
            text = f"{self._label}: {rows:,} rows, {tokens:,} tokens, {rate:,.0f} tokens/s"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
