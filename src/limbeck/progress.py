"""Progress of long work."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 5.0


class Lines:
    """Plain lines on a console, which can be asked for one every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._last_line = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start, above 0."""
        return max(time.monotonic() - self._began, 1e-9)

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def is_due(self) -> bool:
        """Whether the last line that was due, or the start, is a few seconds ago."""
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True


class ProgressBar(Lines):
    """A progress bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, console: Console, label: str, total: int, done: int = 0) -> None:
        """
        Args:
            label: What is done, as `recording`.
            total: Units of the work.
            done: Units that were finished before.
        """
        super().__init__(console)
        self._label, self._total, self._done = label, total, done
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, numbers="")
            self._bar.start()

    def advance(self, units: int, numbers: str) -> None:
        """Count finished units.

        Args:
            numbers: Speed and the like, shown beside the bar.
        """
        self._done += units
        if not self.shows(self._done, numbers) and self.is_due():
            left = (self._total - self._done) * self.seconds / max(self._done, 1)
            counted = f"{self._label} {self._done:,}/{self._total:,}"
            self.say(f"{counted}  {numbers}  {left:,.0f} s left")

    def shows(self, done: int, numbers: str) -> bool:
        """Move the bar to so many finished units; False where there is no bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=numbers)
        return self._bar is not None

    def close(self) -> None:
        """Stop the bar; its last state stays visible."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ProgressLines(Lines):
    """Progress of reading a text, whose length is not known: a plain line every few seconds."""

    def __init__(self, console: Console, label: str) -> None:
        """
        Args:
            label: What is done, as `tokenising`.
        """
        super().__init__(console)
        self._label = label

    def __call__(self, rows: int, tokens: int) -> None:
        """Say how much has been read since the start, unless a line was printed just now."""
        if self.is_due():
            rate = tokens / self.seconds
            self.say(f"{self._label}: {rows:,} rows, {tokens:,} tokens, {rate:,.0f} tokens/s")
