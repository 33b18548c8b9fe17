"""A stop request: a flag that signals set and loops read."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from limbeck.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Requests to save and stop. Schedulers send SIGTERM, or SIGUSR1 some time before it; a closed
terminal sends SIGHUP."""


class StopSignals:
    """A context in which `SIGNALS` set a flag instead of ending the process.

    Enter it when the process starts, before anything slow: a signal that comes while a model loads
    is then seen at the first step. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = dict.fromkeys(SIGNALS, 0)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return any(self._seen.values())

    def counts(self) -> list[int]:
        """How often each of `SIGNALS` came to this process; summed over ranks, all agree."""
        return [self._seen[number] for number in SIGNALS]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._seen[number] += 1
        if number == signal.SIGINT and self._seen[number] > 1:
            raise Stopped(
                "Stopped at once by a second Ctrl-C. What was saved before is intact; continue "
                "with --resume.",
                number,
            )


def reason(counts: list[int]) -> signal.Signals | None:
    """The signal to report, from counts summed over ranks; None without any.

    A run stopped by Ctrl-C alone exits with 130, by any other request with 143.
    """
    seen = [number for number, count in zip(SIGNALS, counts, strict=True) if count]
    if not seen:
        return None
    return signal.SIGINT if seen == [signal.SIGINT] else signal.SIGTERM
