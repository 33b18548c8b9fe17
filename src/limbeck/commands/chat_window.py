"""What `limbeck chat` draws in a terminal, or writes as plain text where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from limbeck.commands.conversation import ScoredAnswer
from limbeck.report.words import harmless

SCALE = ((1.0, "default"), (3.0, "yellow"), (6.0, "orange3"), (float("inf"), "bold red"))
"""Colour of a token by the teacher's -log p of it, nats: up to and excluding."""
COLOURS = {"student": "orange3", "teacher": "steel_blue1"}
SIDE_BY_SIDE = 90
"""Columns from which two answers stand beside each other."""


class ChatWindow:
    """Draws answers while they are written, and once they are complete."""

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        """
        Args:
            names: Path of each model, by `student` and `teacher`.
        """
        self._console, self._names = console, names
        self._live: Live | None = None
        self._so_far: dict[str, str] = {}

    def begin(self, *, has_template: bool) -> None:
        """Print the models and the meaning of the colours."""
        for name, path in self._names.items():
            self._console.print(Text(f"{name}  {harmless(path)}", style=COLOURS[name]))
        if not has_template:
            self.say("The tokenizer has no chat template: each message is continued as plain text.")
        if len(self._names) > 1:
            self._console.print(legend())
        self.say("/help lists the commands.")

    def say(self, text: str) -> None:
        """Print a line that is not an answer."""
        self._console.print(text, style="dim", markup=False, highlight=False)

    def stream(self, name: str, text: str) -> None:
        """Show an answer that is being written."""
        self._so_far[name] = text
        if not self._console.is_terminal:
            return
        drawn = self._beside({n: Text(harmless(t)) for n, t in self._so_far.items()})
        if self._live is None:
            self._live = Live(drawn, console=self._console, transient=True)
            self._live.start()
        self._live.update(drawn)

    def show(self, answers: Mapping[str, ScoredAnswer]) -> None:
        """Show complete answers in place of what was streamed."""
        self.stop()
        shown = {name: Group(coloured(each), footer(each)) for name, each in answers.items()}
        self._console.print(self._beside(shown))

    def stop(self) -> None:
        """End the answer that is being streamed."""
        if self._live is not None:
            self._live.stop()
        self._live, self._so_far = None, {}

    def _beside(self, shown: Mapping[str, RenderableType]) -> RenderableType:
        """Answers in columns where there is room, else one below the other."""
        panels = [
            Panel(each, title=name, title_align="left", border_style=COLOURS[name])
            for name, each in shown.items()
        ]
        if self._console.width < SIDE_BY_SIDE or len(self._names) == 1:
            return Group(*panels)
        columns = Table.grid(expand=True)
        for _ in self._names:
            columns.add_column(ratio=1)
        columns.add_row(*panels)
        return columns


def legend() -> Text:
    """The scale of colours."""
    line = Text()
    line.append("the student's tokens, by the teacher's -log p in nats: ", style="dim")
    low = 0.0
    for high, colour in SCALE:
        span = f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} and more"
        line.append(f" {span} ", style=colour)
        low = high
    return line


def coloured(answer: ScoredAnswer) -> Text:
    """An answer's tokens, each coloured by how improbable the teacher finds it."""
    text = Text()
    for token, nats in answer.tokens:
        text.append(harmless(token), style="default" if nats is None else colour(nats))
    return text


def colour(nats: float) -> str:
    """The colour of a token."""
    return next(style for bound, style in SCALE if nats < bound or bound == float("inf"))


def footer(answer: ScoredAnswer) -> Text:
    """Length, speed, and the teacher's mean -log p."""
    words = [f"{len(answer.tokens)} tokens", f"{answer.tokens_per_second:.1f} a second"]
    nats = [value for _, value in answer.tokens if value is not None]
    if nats:
        words.append(f"teacher's mean -log p {fmean(nats):.2f} nats")
    if answer.is_cut:
        words.append("cut at the longest answer")
    return Text(", ".join(words), style="dim")
