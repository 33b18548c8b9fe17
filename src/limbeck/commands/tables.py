"""Tables that more than one verb prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.report.advice import advice
from limbeck.report.run_files import Evaluation, Figure
from limbeck.report.run_report import METRICS
from limbeck.report.sections import Cell, figure_cell, suite_tables
from limbeck.report.sections import Table as FigureTable
from limbeck.report.story import headline, lede
from limbeck.report.words import MINUS, THIN, TRIALS

COLUMNS = {
    "forward_kl": "KL",
    "top1_agreement": "top-1 agrees",
    "cross_entropy": "CE, nats",
    "bits_per_byte": "bits/byte",
}
"""What fits on a terminal with its intervals; the report has the rest."""


def outcome_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """All trials of an evaluation, with 95 % intervals over documents."""
    if not evaluation.get("trials"):
        return Text("Nothing was measured: the recipe names no held-out text (evaluate.data).")
    title = "Held-out text, against the teacher; 95 % intervals over documents"
    table = figure_table(title, "student")
    measured = TypeAdapter(Evaluation).validate_python(evaluation)
    for trial, title in TRIALS.items():
        if figures := measured.trials.get(trial):
            style = "bold green" if trial == "distilled" else ""
            table.add_row(title, *figure_cells(figures), style=style)
    lines = (headline(measured), *lede(measured), *advice(measured, []))
    more = map(rich_table, suite_tables(measured))
    return Group(table, "", *more, *(Text(plain(line)) for line in lines))


def rich_table(table: FigureTable) -> Table:
    """A table of the report for a terminal."""
    found = Table(title=table.title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for index, head in enumerate(table.heads):
        found.add_column(head, justify="right" if index else "left")
    for row in table.rows:
        found.add_row(*map(cell_text, row))
    return found


def figure_table(title: str, first: str) -> Table:
    """An empty table with a first column and `COLUMNS`, narrow enough for a terminal."""
    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, overflow="fold")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def figure_cells(figures: Mapping[str, Figure]) -> list[Text]:
    """The cells of a row under `COLUMNS`."""
    return [cell_text(figure_cell(figures.get(name), METRICS[name].shown)) for name in COLUMNS]


def cell_text(cell: Cell) -> Text:
    """A cell in two lines."""
    return Text(plain("\n".join(filter(None, (cell.value, cell.ends)))))


def plain(text: str) -> str:
    """A sentence of the report in characters that every terminal has."""
    return text.replace(THIN, " ").replace(MINUS, "-")
