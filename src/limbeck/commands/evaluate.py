"""`limbeck evaluate`: figures of any student against a recipe's teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from limbeck.commands.arguments import Overrides, Recipe, option
from limbeck.commands.tables import outcome_table
from limbeck.experiment import assemble, load


def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    student: Annotated[
        Path | None, option(help="A student's folder; that of the recipe's own run by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a student against the recipe's teacher on the recipe's held-out text.

    Prints divergences, agreement, cross-entropy, perplexity, bits per byte and calibration, each
    with a bootstrap interval over documents, and the suites of evaluate.suites
    (docs/evaluation.md). Trains and writes nothing.
    """
    with assemble(load(recipe, overrides or [])) as run:
        evaluation = run.evaluate(student)
        if not run.is_main:
            return
        if as_json:
            typer.echo(json.dumps(evaluation))
        else:
            Console().print(outcome_table(evaluation))
