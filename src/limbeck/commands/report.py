"""`limbeck report`: the page, from a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.report.run_report import write_report


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
) -> None:
    """Write report.html anew from what a run directory holds.

    The page is one file without scripts or references to anywhere: send it to a colleague.
    """
    typer.echo(write_report(run))
