"""Progress of a run on the terminal."""

from __future__ import annotations

import os
import signal
import sys

from rich.console import Console

from limbeck.progress import ProgressBar
from limbeck.train.metrics import Record

UNSHOWN = (
    *("kind", "step", "student_confidence", "student_hit", "padded_mass", "tokens"),
    *("jensen_shannon", "top5_agreement", "teacher_entropy"),
)
"""Fields of an evaluation that are in metrics.jsonl only."""


class ProgressConsole(Console):
    """A console on which a broken pipe makes the run save and stop."""

    def on_broken_pipe(self) -> None:
        """Stop writing, and stop the run as SIGHUP does."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        signal.raise_signal(signal.SIGHUP)


class TerminalSink:
    """A progress bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, console: Console, title: str = "distilling") -> None:
        self._console, self._title = console, title
        self._bar: ProgressBar | None = None
        self._ends = (0, 0)

    def begin(self, step: int, steps: int) -> None:
        """Show the bar at the first step."""
        self._bar = ProgressBar(self._console, self._title, steps, step)
        self._ends = (step + 1, steps)

    def write(self, record: Record) -> None:
        assert self._bar is not None, "begin() comes first"
        text = in_words(record, self._ends[1])
        if record["kind"] != "step":
            self._bar.say(text)
            return
        numbers = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if not self._bar.shows(record["step"], numbers) and (
            self._bar.is_due() or record["step"] in self._ends
        ):
            self._bar.say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def in_words(record: Record, steps: int) -> str:
    """One record as a line of text."""
    at = f"step {record.get('step', 0)}/{steps}"
    match record["kind"]:
        case "step":
            left = record["seconds"] / max(1, record["step"]) * (steps - record["step"])
            return (
                f"{at}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3g}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
            )
        case "evaluation":
            shown = {k: v for k, v in record.items() if is_shown(k) and v is not None}
            return f"{at}  held out: " + "  ".join(
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items()
            )
        case "non_finite":
            return (
                f"{at}  loss or gradient is not a number; no step was taken. "
                f"Rows {record['rows']} ({', '.join(record['documents'])})"
            )
    return str(record.get("text", ""))


def is_shown(name: str) -> bool:
    """Whether a line of text has a metric; of further held-out texts it has the forward KL."""
    text, _, metric = name.rpartition("/")
    return metric == "forward_kl" if text else metric not in UNSHOWN
