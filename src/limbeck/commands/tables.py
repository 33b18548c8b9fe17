"""Tables that more than one verb prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.report import sections
from limbeck.report.advice import advice
from limbeck.report.run_files import Evaluation
from limbeck.report.story import headline, lede
from limbeck.report.words import MINUS, THIN, TRIALS

COLUMNS = {
    "forward_kl": ("KL", "{:.3f}"),
    "top1_agreement": ("top-1 agrees", "{:.1%}"),
    "cross_entropy": ("CE, nats", "{:.3f}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
}
"""What fits on a terminal with its intervals; the report has the rest."""


def outcome_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """All trials of an evaluation, with 95 % intervals over documents."""
    if not evaluation.get("trials"):
        return Text("Nothing was measured: the recipe names no held-out text (evaluate.data).")
    title = "Held-out text, against the teacher; 95 % intervals over documents"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("student")
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for trial, title in TRIALS.items():
        if figures := evaluation["trials"].get(trial):
            cells = [cell(figures.get(name), form) for name, (_, form) in COLUMNS.items()]
            table.add_row(title, *cells, style="bold green" if trial == "distilled" else "")
    measured = TypeAdapter(Evaluation).validate_python(evaluation)
    lines = (headline(measured), *lede(measured), *advice(measured, []))
    more = map(rich_table, sections.suite_tables(measured))
    return Group(table, *more, *(Text(plain(line)) for line in lines))


def rich_table(table: sections.Table) -> Table:
    """A table of the report for a terminal."""
    found = Table(title=table.title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for index, head in enumerate(table.heads):
        found.add_column(head, justify="right" if index else "left")
    for row in table.rows:
        found.add_row(*(Text(plain("\n".join(filter(None, (c.value, c.ends))))) for c in row))
    return found


def cell(figure: Mapping[str, float] | None, form: str) -> str:
    """A figure with its interval, or a dash without one."""
    if figure is None:
        return "-"
    value, low, high = (form.format(figure[key]) for key in ("value", "low", "high"))
    return value if low == high else f"{value}\n{low}-{high}"


def plain(text: str) -> str:
    """A sentence of the report in characters that every terminal has."""
    return text.replace(THIN, " ").replace(MINUS, "-")
