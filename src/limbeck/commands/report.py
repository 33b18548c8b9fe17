"""`limbeck report`: the page, from a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from limbeck.report.run_report import write_report


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
) -> None:
    """Write report.html again from a run directory.

    The page is one file without scripts and external references, so it can be sent by mail.
    """
    typer.echo(write_report(run))
