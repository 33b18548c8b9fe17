"""The command line: one file a verb, errors without tracebacks, exit codes a scheduler can use."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from limbeck import __version__
from limbeck.errors import ConfigError, LimbeckError, RunError, Stopped

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""In the environment of a process that torchrun started."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a process that was stopped by a signal."""

READER_LEFT = 1
"""Exit code of click and of rich when the reader of their output has left. limbeck has no other
use for it."""

VERBS = {
    "demo": "Distil a small model on this machine in about 5 minutes, and open the report.",
    "peek": "Show which tokens a teacher (and a student) find likely after every token of a text.",
    "check": "Verify models, text and objective before training; estimate memory and time.",
    "shrink": "Prune a teacher into a student, by measured importance.",
    "record": "Run the teacher over a data set once and store its distributions.",
    "write": "Let the teacher answer prompts, and write the answers as training data.",
    "forecast": "Predict a recipe's figures and cost from short pilot runs of it.",
    "distill": "Train a student from a teacher, and compare the two.",
    "evaluate": "Measure a student against the recipe's teacher on held-out text.",
    "chat": "Chat with a student in the terminal, and with its teacher beside it.",
    "export": "Write a student as GGUF, ONNX or ExecuTorch and verify it in its runtime.",
    "push": "Publish a student on the Hugging Face hub, or write what would be published.",
    "report": "Write report.html again from a run directory, or compare several runs.",
    "store": "Inspect, verify, repair and merge stores of recorded teacher signals.",
}
"""Each verb with its line in `limbeck --help`; its module is imported when the verb is used."""

WITH_RECIPE = ("check", "record", "write", "forecast", "distill", "evaluate")
"""Verbs whose first argument is a recipe."""

WITHOUT_STUDENT = ("record", "write")
"""Those that read neither its student nor its held-out text."""

WITH_MODEL = {"peek": "TEACHER", "shrink": "TEACHER", "chat": "STUDENT", "export": "STUDENT"}
"""Verbs whose first argument is a model, with its name in messages."""

OVERRIDE = re.compile(r"[a-z][\w.\[\]]*=")
"""How an argument that changes the recipe begins."""

GROUPS = ("store",)
"""Verbs with verbs of their own."""

EXPLANATION = """Distils a large language model (the teacher) into a small one (the student).

The student is trained on the teacher's probability of every token at every
position, not only on the next token of a text. A run writes a student in
safetensors and a report that compares it with its teacher.

  limbeck demo                            a first run, about 5 minutes
  limbeck peek TEACHER "a text"           the tokens a teacher finds likely
  limbeck distill TEACHER STUDENT DATA    write a recipe and run it
  limbeck distill recipe.yaml a.b=value   run a recipe, one option changed

Exit codes: 0 done; 2 invalid recipe; 3 invalid or damaged data; 4 failed, can
be resumed; 5 loss or gradient not finite; 6 disk full or no permission; 75
try again later; 130 Ctrl-C and 143 a signal, both after saving.
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
        if name is not None:
            refuse_early(name, rest)
        return name, command if name is None else load_verb(name), rest


def require_launcher(verb: str) -> None:
    """Refuse one of several tasks of srun without torchrun: each would be a run of its own.

    Raises:
        ConfigError: With the line to use.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"Tasks of srun must be joined by torchrun, and srun started limbeck itself {tasks} "
            "times: each would be a run of its own. Start torchrun once on each node: srun "
            '--ntasks-per-node=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node GPUS '
            '--rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint HEAD:29500 -m limbeck '
            f"{verb} ..., where HEAD is the first node. Start one process with srun --ntasks=1."
        )


def refuse_early(verb: str, words: list[str]) -> None:
    """Refuse what can be seen to be wrong before the verb's module is imported.

    Raises:
        ConfigError: A recipe is missing, is not YAML, or has unknown options or wrong values; or
            models or texts are not there.
        DataError: A text is empty.
        TryLaterError: A model is not in the cache, and the network is switched off.
    """
    options = {word for word in words if word.startswith("-")}
    named = [word for word in words if not word.startswith("-")]
    if {"-h", "--help"} & options or not named:
        return
    if verb in WITH_RECIPE:
        require_launcher(verb)
    is_recipe = named[0].endswith((".yaml", ".yml"))
    if verb == "check" and "--plan" not in options:
        return  # it lists these mistakes with all others
    if verb in WITH_RECIPE and is_recipe:
        from limbeck.config.reading import Needs, require_options  # noqa: PLC0415  (imports pydantic)

        changes = [word for word in words if OVERRIDE.match(word)]
        is_shown, is_planned = "--print-config" in options, verb == "check"
        needs = Needs(
            models=not is_shown,
            student=verb not in WITHOUT_STUDENT,
            texts=not (is_shown or is_planned),
        )
        require_options(Path(named[0]), changes, needs)
    elif verb == "distill" and not is_recipe:
        require_words(named)
    elif verb in WITH_MODEL and words[0] == named[0]:
        from limbeck.config.reading import require_paths  # noqa: PLC0415  (imports pydantic)
        from limbeck.files import expanded  # noqa: PLC0415  (imports filelock)

        if not expanded(words[0]).is_dir() or verb in ("peek", "shrink"):
            require_paths(verb, [(WITH_MODEL[verb], {"path": words[0]})], [])


def require_words(named: list[str]) -> None:
    """Refuse models or data of `limbeck distill TEACHER STUDENT DATA` that are not there."""
    from limbeck.commands.short_form import is_short, pruned_student  # noqa: PLC0415
    from limbeck.config.reading import require_paths  # noqa: PLC0415  (imports pydantic)

    places = [word for word in named if "=" not in word]
    if len(places) != 3 or not is_short(named):
        return
    teacher, student, data = places
    models = [("TEACHER", {"path": teacher})]
    if pruned_student(student)[0] is None:
        models.append(("STUDENT", {"path": student}))
    require_paths("distill", models, [("DATA", data)])


def load_verb(name: str) -> Any:
    """A verb's command, from the module of its name."""
    module = importlib.import_module(f"limbeck.commands.{name}")
    if name in GROUPS:
        app = module.build()
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        app.command(name=name, cls=Verb)(vars(module)[name])
    command: Any = typer.main.get_command(app)
    for each in (command, *getattr(command, "commands", {}).values()):
        each.help = paragraphs(each.help or "")
    return command


def paragraphs(text: str) -> str:
    """A docstring without line breaks inside paragraphs: a terminal has a width of its own."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


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
    if "RANK" not in os.environ:
        sys.exit(run())
    # The interpreter's own end waits for collectives of NCCL that another rank may never join, and
    # threads of gloo that outlive it now and then abort a process that is done.
    try:
        code = run()
    except BaseException:  # a bug; the interpreter would print the same
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
