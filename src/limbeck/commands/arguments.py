"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(
    *names: str, help: str, min: int | float | None = None, max: int | float | None = None
) -> Any:
    """An option without a default, or with one that its help does not show."""
    return typer.Option(*names, help=help, min=min, max=max, show_default=False)


def argument(*, help: str, metavar: str | None = None) -> Any:
    """An argument without a default."""
    return typer.Argument(help=help, metavar=metavar, show_default=False)


Recipe = Annotated[Path, argument(help="The recipe, YAML.")]
Overrides = Annotated[
    list[str] | None, argument(help="Changes to the recipe: key.sub=value, each in YAML.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run a model's own Python; needs a commit.")
]
