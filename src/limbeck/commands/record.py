"""`limbeck record`: the teacher's signals for a data set, once, into a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.commands.arguments import Overrides, Recipe
from limbeck.distributed import StopSignals, World, all_sum
from limbeck.distributed.stopping import reason
from limbeck.errors import Stopped
from limbeck.experiment import load
from limbeck.files import size
from limbeck.recording import Budget, Recording, parse_part


def record(
    recipe: Recipe,
    overrides: Overrides = None,
    shards: Annotated[
        str, typer.Option(help="Record only this part, as 3/16; a different one on each machine.")
    ] = "1/1",
    budget_only: Annotated[
        bool, typer.Option("--budget", help="Print the budget and exit.")
    ] = False,
    skip_budget: Annotated[
        bool, typer.Option("--no-budget", help="Start at once, without the budget.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print budget and outcome as JSON.")
    ] = False,
) -> None:
    """Run the teacher over a data set once, and store its distributions for any number of students.

    The recipe's `record` section names form and folder. First a budget is printed: bytes a token,
    size, and error of several forms, measured with this teacher on this text. The recording can be
    stopped or killed at any point; the same command resumes it. The held-out text of evaluate.data
    is recorded as well.

    Then: limbeck distill recipe.yaml teacher='{type: stored, path: stores/x}'

    On several machines with a shared folder, or with parts that `limbeck store merge` merges later:
    limbeck record recipe.yaml --shards 1/16 (to 16/16). On several GPUs, the teacher sharded over
    them: torchrun --nproc-per-node 8 -m limbeck record recipe.yaml
    """
    part = parse_part(shards)
    with StopSignals() as stop, Recording(load(recipe, overrides or [])) as recording:
        check = partial(leave_if_asked, stop, recording.world, recording.settings.output)
        check()
        is_main = recording.world.is_main
        if is_main:
            for note in recording.teacher.notes:
                Console(stderr=True).print(f"note: {note}", markup=False, highlight=False)
        skipped = skip_budget or not (recording.has_budget or budget_only)
        budget = None if skipped else recording.budget()
        if budget is not None and is_main and not (as_json and budget_only):
            Console(stderr=as_json).print(budget_table(budget))
        facts = None if budget is None else asdict(budget)
        if budget_only:
            if as_json and is_main:
                typer.echo(json.dumps(facts))
            return
        done = recording.record(part, budget, check)
        if is_main and as_json:
            typer.echo(json.dumps({**asdict(done), "store": str(done.store), "budget": facts}))
        elif is_main:
            missing = f", {done.left} not there yet" if done.left else ""
            typer.echo(
                f"store    {done.store}\n"
                f"shards   {done.recorded} recorded now, {done.shards} in all{missing}\n"
                f"tokens   {done.scored:,}"
            )


def leave_if_asked(stop: StopSignals, world: World, folder: Path) -> None:
    """Stop every rank between two passes of the teacher, after a signal to any of them."""
    counts = torch.tensor(stop.counts(), device=world.device)
    if number := reason(all_sum(counts).tolist()):
        raise Stopped(
            f"The recording was stopped by {number.name}; finished shards are kept in {folder}. "
            "Run the same command to continue.",
            number,
        )


def relative(error: float) -> str:
    """A relative error in percent, or as a multiple from ten times on.

    Example:
        >>> relative(0.0312), relative(640.7)
        ('3.1%', '641x')
    """
    return f"{error:.1%}" if error < 10 else f"{error:,.0f}x"


def budget_table(budget: Budget) -> RenderableType:
    """Size and error of every setting."""
    table = Table(
        title=f"What a store of {budget.scored:,} tokens takes",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("form")
    for heading in ("bytes/token", "size", "bias, nats", "gradient"):
        table.add_column(heading, justify="right")
    for each in budget.settings:
        table.add_row(
            in_words(each.form if each.chosen else without_temperature(each.form)),
            f"{each.bytes_per_token:,.0f}",
            size(each.total_bytes + budget.layers_bytes),
            f"{each.loss_bias:+.4f}",
            relative(each.gradient_error),
            style="bold green" if each.chosen else "",
        )
    loss = budget.settings[0].loss
    return Group(
        table,
        Text(
            f"Measured on {budget.measured_tokens:,} tokens of this text at temperature "
            f"{budget.temperature:g}, against a stand-in student {loss:.3f} nats from the teacher. "
            "In green the recipe's own. Bias is the loss's, less the dense teacher's; gradient the "
            "error of its gradient at the logits. The errors of samples are chance and average "
            "out; those of top_k do not. The bias of samples is one draw of an error whose mean is "
            "0.\n"
            f"{budget.windows:,} windows, {budget.positions:,} positions to read; "
            f"{size(budget.free_bytes)} free on the disk."
        ),
    )


def without_temperature(form: Mapping[str, object]) -> Mapping[str, object]:
    """A form without its temperature, which the line below the table gives for all."""
    return {k: v for k, v in form.items() if k not in ("temperature", "temperatures")}


def in_words(form: Mapping[str, object]) -> str:
    """A form with its options, as text."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in form.items() if k != "type"}
    return ", ".join([str(form["type"]), *(f"{k}: {v}" for k, v in options.items())])
