"""`limbeck forecast`: what a recipe will reach, from short pilot runs of it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from limbeck.commands.arguments import Overrides, Recipe, option
from limbeck.commands.tables import plain, rich_table
from limbeck.distributed import is_main_process
from limbeck.errors import ConfigError
from limbeck.experiment import load, load_stages
from limbeck.experiment.forecast import Alternative, alternative, forecast_folder, run_pilots
from limbeck.experiment.forecast_figures import ForecastOptions
from limbeck.experiment.forecast_figures import forecast as predict
from limbeck.files import write_text
from limbeck.report.forecast_page import forecast_page, sentences, tables


def forecast(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    pilots: Annotated[
        int, typer.Option(help="Different budgets; the smallest two run again with other seeds.")
    ] = 4,
    budget: Annotated[int | None, option(min=1, help="A number of scored tokens.")] = None,
    hours: Annotated[float | None, option(min=0.0, help="A training time.")] = None,
    target_kl: Annotated[
        float | None, option(min=0.0, help="A forward KL to reach, nats a token.")
    ] = None,
    against: Annotated[
        list[str] | None, option(help="A change that makes the other recipe; may be repeated.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete earlier pilots first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as JSON.")] = False,
) -> None:
    """Forecast a recipe's held-out KL and cross-entropy from short pilot runs of it.

    The pilots are whole runs of the recipe with fewer steps: learning rate and all schedules end
    with them, each has twice the steps of the one before, and together they take at most a fifth
    of the recipe's. They stay in OUTPUT/forecast; the same command reuses them, and continues
    after Ctrl-C. A curve through them gives the figures of other budgets. The command refuses to
    answer where the pilots do not determine the curve.

    --against runs as many pilots of another recipe, and the answer says which of the two is nearer
    to the teacher after the same time, and with the same tokens.

    Examples: limbeck forecast recipe.yaml --target-kl 0.5 --hours 8;
    limbeck forecast recipe.yaml --against student.keep=20;
    limbeck forecast recipe.yaml evaluate.baseline=cross_entropy
    """
    changes = overrides or []
    if load_stages(recipe, changes):
        raise ConfigError(
            f"A forecast is of one run, and {recipe} has stages. Write the stage as a recipe."
        )
    config = load(recipe, changes)
    other = alternative(config, load(recipe, [*changes, *against]), against) if against else None
    config, found = run_pilots(config, pilots, overwrite=overwrite)
    if other is not None:
        other = Alternative(other.name, *run_pilots(other.config, pilots, overwrite=overwrite))
    if not is_main_process():
        return
    answer = predict(config, found, ForecastOptions(budget, hours, target_kl), other)
    folder = forecast_folder(config)
    write_text(folder / "forecast.json", json.dumps(answer, indent=1))
    write_text(folder / "forecast.html", forecast_page(answer, config.output.name))
    if as_json:
        typer.echo(json.dumps(answer))
        return
    console = Console()
    for table in tables(answer)[:-1]:  # the pilots are in the page
        console.print(rich_table(table))
    for sentence in sentences(answer):
        console.print(Text(plain(sentence)))
    typer.echo(folder / "forecast.html")
