"""`limbeck peek`: a teacher's most probable tokens, beside the one that followed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from limbeck.commands.arguments import Device, RemoteCode
from limbeck.commands.opening import open_models
from limbeck.commands.peek_picture import show
from limbeck.errors import ConfigError
from limbeck.evaluate.peek import peek as look_at
from limbeck.files import write_text
from limbeck.report.peek_report import peek_page


def peek(
    words: Annotated[
        list[str],
        typer.Argument(metavar="TEACHER [STUDENT] TEXT", help="One model or two, and a text."),
    ],
    temperatures: Annotated[
        str, typer.Option(help="Softmax temperatures, side by side; 1 is always shown.")
    ] = "1,2,4",
    top: Annotated[
        int, typer.Option(min=1, help="How many of the teacher's most probable tokens.")
    ] = 5,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    revision: Annotated[
        list[str] | None,
        typer.Option(help="Revision of the teacher; repeat for the student."),
    ] = None,
    trust_remote_code: RemoteCode = False,
    device: Device = "auto",
) -> None:
    """Show the most probable tokens of a teacher, and of a student, after every token of a text.

    Examples: limbeck peek HuggingFaceTB/SmolLM2-135M "The capital of France is Paris";
    limbeck peek TEACHER runs/x/student "Once upon a time" --temperatures 1,2,4 --html peek.html
    """
    if not 2 <= len(words) <= 3:
        raise ConfigError(
            f"peek takes a teacher, an optional student, and a text in quotes, got "
            f"{len(words)} word{'s' if len(words) != 1 else ''}. "
            'For example: limbeck peek TEACHER STUDENT "Once upon a time".'
        )
    *paths, text = words
    warm = parse_temperatures(temperatures)

    models, tokenizer = open_models(paths, revision or [], trust_remote_code, device)
    student = models[1] if len(models) > 1 else None
    seen = look_at(tokenizer, models[0], student, text, warm, top=top)
    if html is not None:
        second = paths[1] if student is not None else None
        write_text(html, peek_page(seen.to_plain(), teacher=paths[0], student=second))
    if as_json:
        typer.echo(json.dumps(seen.to_plain(), ensure_ascii=False))
    else:
        show(seen, paths, Console())
        if html is not None:
            typer.echo(f"Written: {html}")


def parse_temperatures(given: str) -> list[float]:
    """`1,2,4` as numbers."""
    try:
        warm = [float(part) for part in given.split(",")]
    except ValueError:
        warm = [math.nan]
    if not all(math.isfinite(t) and t > 0 for t in warm):
        raise ConfigError(
            f"--temperatures must be numbers above 0 with commas between, got {given!r}. Try 1,2,4."
        )
    return warm
