"""`limbeck distill`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from limbeck.commands.tables import outcome_table
from limbeck.config import dump

Recipe = Annotated[Path, typer.Argument(help="The recipe, YAML.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe: key.sub=value, each in YAML.", show_default=False),
]


def distill(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of the run directory.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away what is in the run directory first.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and leave.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Train a student from a teacher, and measure what it kept.

    Everything in the recipe is checked before a model loads. The run directory (`output`) then
    holds the resolved recipe, metrics.jsonl, checkpoints, the student in safetensors, and
    report.html. Ctrl-C and SIGTERM save first; `--resume` goes on, on a CPU bit for bit.

    On several GPUs or processes: torchrun --nproc-per-node 8 -m limbeck distill recipe.yaml
    """
    from limbeck.recipe import assemble, load  # noqa: PLC0415  (help need not load torch)

    config = load(recipe, overrides or [])
    console = Console()
    if print_config:
        typer.echo(dump(config), nl=False)
        return
    with assemble(config) as run:
        outcome = run.train(resume=resume, overwrite=overwrite)
        if not run.is_main:
            return
        if as_json:
            typer.echo(json.dumps(outcome.evaluation))
            return
        console.print(outcome_table(outcome.evaluation))
        console.print(f"student  {outcome.student}")
        if outcome.report:
            console.print(f"report   {outcome.report}")
