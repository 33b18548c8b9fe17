"""`limbeck write`: the teacher's answers to prompts, in a file that a run trains on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from limbeck.commands.arguments import Overrides, Recipe
from limbeck.distributed import StopSignals
from limbeck.distributed.stopping import reason
from limbeck.errors import Stopped
from limbeck.experiment import load
from limbeck.writing import Summary, Writing


def write(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Let the teacher answer the prompts of `data`, and write the answers as training data.

    The recipe's `write` section names the file and the sampling. Everything before the last answer
    of a row of `data` is its prompt; rows without answers are prompts too. Answers that are empty,
    truncated, repeated or refused by a filter are dropped and counted. Writing can be stopped or
    killed at any point; the same command resumes it, and the file is the same, to the byte, as
    without the interruption.

    Then: limbeck distill recipe.yaml data.path=FILE data.type=auto
    """
    with StopSignals() as stop, Writing(load(recipe, overrides or [])) as writing:
        for note in writing.notes:
            Console(stderr=True).print(f"note: {note}", markup=False, highlight=False)
        summary = writing.write(partial(leave_if_asked, stop, recipe))
        if as_json:
            typer.echo(json.dumps(summary.to_json()))
        else:
            show(summary, recipe)


def leave_if_asked(stop: StopSignals, recipe: Path) -> None:
    """Stop between two batches after a signal."""
    if number := reason(stop.counts()):
        raise Stopped(
            f"Writing was stopped by {number.name}; finished batches are kept. Run the same "
            f"command to continue: limbeck write {recipe}",
            number,
        )


def show(summary: Summary, recipe: Path) -> None:
    """Print what was written and dropped, and the command that trains on it."""
    progress = summary.progress
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{summary.answers:,}", f"answers to {summary.prompts:,} prompts")
    for why, count in sorted(progress.dropped.items()):
        table.add_row(f"{count:,}", f"dropped: {why}")
    mean = progress.tokens / max(1, progress.kept)
    table.add_row(f"{progress.kept:,}", f"written, {mean:,.0f} tokens each")
    Console().print(table)
    typer.echo(
        f"written  {summary.output}\n"
        f"train    limbeck distill {recipe} data.path={summary.output} data.type=auto"
    )
