"""`limbeck report`: the page of a run directory, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from limbeck.commands.arguments import argument, option
from limbeck.commands.tables import figure_cells, figure_table
from limbeck.errors import ConfigError
from limbeck.experiment.comparison import ComparedRun, compare_runs
from limbeck.files import write_text
from limbeck.report.comparison import comparison_page, verdict
from limbeck.report.run_files import Figure
from limbeck.report.run_report import write_report
from limbeck.report.words import count


def report(
    runs: Annotated[list[Path], argument(help="A run directory, or several.")],
    output: Annotated[
        Path | None, option(help="Page that compares several runs; comparison.html by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON; write no page.")
    ] = False,
) -> None:
    """Write the report of a run again, or compare several runs.

    With one run directory: writes its report.html. With several: writes a page and prints a table
    of their students, lowest forward KL first, with differences paired by document where teacher
    and test text are the same, and the options in which their recipes differ.

    Each page is one file, without scripts and external references.

    Examples: limbeck report runs/x; limbeck report runs/kl runs/jsd runs/ce --output page.html
    """
    if len(runs) == 1:
        if output is not None or as_json:
            raise ConfigError(
                "--output and --json are for several runs; a run's own page is report.html in its "
                "folder. Name a second run, or leave them out."
            )
        typer.echo(write_report(runs[0]))
        return
    compared = compare_runs(runs)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in compared]))
        return
    path = output or Path("comparison.html")
    write_text(path, comparison_page([asdict(run) for run in compared]))
    console = Console()
    console.print(comparison_table(compared))
    for run in compared:
        words = verdict(asdict(run), first=run is compared[0])
        console.print(f"{run.name}: {words}", markup=False, highlight=False, soft_wrap=True)
    typer.echo(path)


def comparison_table(runs: Sequence[ComparedRun]) -> Table:
    """The students of several runs, lowest forward KL first."""
    title = "Test documents, lowest KL first; 95 % intervals over documents"
    table = figure_table(title, "run")
    table.add_column("parameters", justify="right")
    for run in runs:
        cells = figure_cells({name: Figure(**figure) for name, figure in run.figures.items()})
        table.add_row(escape(run.name), *cells, count(run.parameters))
    return table
