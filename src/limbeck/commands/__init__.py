"""The command line: one file a verb, errors without tracebacks, exit codes a scheduler can use."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from limbeck import __version__
from limbeck.errors import LimbeckError, RunError, Stopped

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""In the environment of a process that torchrun started."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a process that was stopped by a signal."""

READER_LEFT = 1
"""Exit code of click and of rich when the reader of their output has left. limbeck has no other
use for it."""

VERBS = {
    "demo": "Distil a real model on this machine, in minutes, and open the report.",
    "peek": "Show the tokens that a teacher, and a student, find likely, along a text.",
    "check": "Verify models, text and objective before training; estimate memory and time.",
    "shrink": "Make a smaller student from the teacher, by measurement.",
    "record": "Run the teacher over a data set once and store its distributions.",
    "write": "Let the teacher answer prompts, into a file that a run trains on.",
    "forecast": "Foretell a recipe's figures and cost from short pilot runs of it.",
    "distill": "Train a student from a teacher, and measure what it kept.",
    "evaluate": "Measure a student against the recipe's teacher on held-out text.",
    "chat": "Talk to a student in the terminal, beside its teacher.",
    "export": "Write a student as GGUF for llama.cpp or Ollama, verified there.",
    "push": "Publish a student on the Hugging Face hub, or write what would be published.",
    "report": "Write report.html again from a run directory, or compare several runs.",
    "store": "Inspect, verify, repair and merge stores of recorded teacher signals.",
}
"""Each verb with its line in `limbeck --help`; its module is imported when the verb is used."""

WITH_RECIPE = ("check", "record", "write", "forecast", "distill", "evaluate")
"""Verbs whose first argument is a recipe."""

GROUPS = ("store",)
"""Verbs with verbs of their own."""

EXPLANATION = """Distils a large language model (the teacher) into a small one (the student).

The student learns the teacher's [bold]dark knowledge[/bold]: its whole probability distribution
over the vocabulary at every position, not only the next token of a data set. The run ends with a
student in safetensors and a report of what was kept and what was lost.

  limbeck demo                       the whole chain on this machine, in minutes
  limbeck peek TEACHER "some text"   what a teacher knows beyond the next token
  limbeck check recipe.yaml          everything that can be known before the first step
  limbeck shrink TEACHER --layers 20 a student out of the teacher, by measurement
  limbeck record recipe.yaml         the teacher's answers once, into a store
  limbeck write recipe.yaml          the teacher's texts, to train on
  limbeck forecast recipe.yaml       what it will reach, from short pilot runs
  limbeck distill recipe.yaml        the main job; add key=value to change the recipe
  limbeck distill TEACHER 12 DATA    the same without a recipe: it is written for you
  limbeck chat STUDENT [TEACHER]     talk to it; the teacher answers beside it
  limbeck export STUDENT --output DIR  the student as a verified GGUF file

Exit codes: 0 done; 2 the recipe is wrong; 3 the data is wrong or damaged; 4 failed, can be resumed;
5 numbers stopped being finite; 6 disk or permission; 75 try later; 130 Ctrl-C, 143 stopped by a
signal, both after saving.
"""


def build() -> typer.Typer:
    """The application with its verbs, none of them imported."""
    app = typer.Typer(
        cls=LazyVerbs,
        help=EXPLANATION,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(version)
    for verb, summary in VERBS.items():
        app.command(name=verb, help=summary)(not_loaded)
    return app


def not_loaded() -> None:
    """Stands for a verb in the list of verbs; `LazyVerbs` replaces it before it is called."""
    raise AssertionError("verbs are loaded when they are resolved")


class LazyVerbs(TyperGroup):
    """Lists verbs without their modules, and imports the module of the one that is called.

    The modules import torch and transformers, which takes seconds.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The verb that the arguments name, with its module imported."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in WITH_RECIPE:
            require_recipe(rest)
        return name, command if name is None else load_verb(name), rest


def require_recipe(words: list[str]) -> None:
    """Refuse a recipe that cannot be read before the verb's module is imported.

    Raises:
        ConfigError: The first argument is named as a YAML file, and is missing or is not YAML.
    """
    first = next((word for word in words if not word.startswith("-")), "")
    if first.endswith((".yaml", ".yml")) and not {"-h", "--help"} & set(words):
        from limbeck.config.reading import parse  # noqa: PLC0415  (imports pydantic)

        parse(Path(first), ())


def load_verb(name: str) -> Any:
    """A verb's command, from the module of its name."""
    module = importlib.import_module(f"limbeck.commands.{name}")
    if name in GROUPS:
        return typer.main.get_command(module.build())
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name=name, cls=Verb)(vars(module)[name])
    return typer.main.get_command(app)


class Verb(TyperCommand):
    """A command that answers an unknown option with the recipe's option of that name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, after a look for options that belong into the recipe."""
        known = {o for each in self.params for o in (*each.opts, *each.secondary_opts)}
        options = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
        for option in sorted(options - known - {"--", "--help"}):
            from limbeck.config.foreign_names import FOREIGN_NAMES  # noqa: PLC0415  (imports pydantic)
            from limbeck.config.reading import recipe_option  # noqa: PLC0415

            name = option.lstrip("-").replace("-", "_")
            if path := FOREIGN_NAMES.get(name) or recipe_option(name):
                raise typer.BadParameter(
                    f"no such option: {option}. Options of the recipe are written without dashes: "
                    f"{path}=VALUE.",
                    ctx=ctx,
                )
        return super().parse_args(ctx, args)


def print_version(show: bool) -> None:
    """Print the version before click asks for a verb."""
    if show:
        typer.echo(f"limbeck {__version__}")
        raise typer.Exit


def version(
    show: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=print_version
        ),
    ] = False,
) -> None:
    """Options of the application itself."""


def main() -> None:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGINT, raise_stopped)
    signal.signal(signal.SIGTERM, raise_stopped)
    signal.signal(signal.SIGHUP, raise_stopped)
    code = run()
    if LAUNCHED in os.environ:
        # Threads of gloo that outlive the interpreter now and then abort a process that is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run() -> int:
    """Run the command line; the exit code of what happened."""
    try:
        build()()
    except SystemExit as ending:  # typer has printed its message
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        return STOPPED if code == READER_LEFT else code
    except LimbeckError as error:
        print_error(str(error))
        return exit_code(error)
    except (MemoryError, RuntimeError) as error:
        from limbeck.train.micro_batch import KNOBS, is_out_of_memory  # noqa: PLC0415  (imports torch)

        if not is_out_of_memory(error):
            raise
        print_error(f"A run must fit into memory, and this one does not: {error} {KNOBS}")
        return RunError.exit_code
    return 0


def print_error(text: str) -> None:
    """Print an error on stderr."""
    console = Console(stderr=True)
    try:
        console.print(f"[bold red]limbeck:[/bold red] {escape(text)}", soft_wrap=True)
    except (OSError, SystemExit):  # the terminal is gone; the exit code remains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """Signal handler outside the training loop, where there is nothing to save."""
    raise Stopped(f"Stopped by {signal.Signals(number).name}.", number)


def exit_code(error: LimbeckError) -> int:
    """The process's exit code; 0 for a stopped worker, whose launcher reports the signal."""
    return 0 if isinstance(error, Stopped) and LAUNCHED in os.environ else error.exit_code


def escape(text: str) -> str:
    """Text with brackets escaped for rich."""
    return text.replace("[", r"\[")
