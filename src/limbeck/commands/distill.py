"""`limbeck distill`: train a student and measure it."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from limbeck.commands.arguments import argument, option
from limbeck.commands.check import check, verify
from limbeck.commands.first_recipe import write_recipe
from limbeck.commands.short_form import is_short
from limbeck.commands.tables import outcome_table
from limbeck.config import RunConfig, dump
from limbeck.errors import ConfigError
from limbeck.experiment import Run, RunResult, Stage, assemble, load, load_stages, run_stages

Words = Annotated[
    list[str],
    argument(
        metavar="RECIPE | TEACHER STUDENT DATA [key=value ...]",
        help="A recipe, or two models and data; then changes to the recipe, each value in YAML.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the last checkpoint of the run directory.")
]
ResumeFrom = Annotated[
    int | None, option(help="Continue from the checkpoint of this step; later ones are renamed.")
]


def distill(
    words: Words,
    plan: Annotated[
        bool, typer.Option("--plan", help="Write the recipe, check it, and exit.")
    ] = False,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the contents of the run directory first.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Train a student from a teacher, and compare the two.

    Everything in the recipe is checked before a model loads. The run directory (`output`) then
    holds the resolved recipe, metrics.jsonl, checkpoints, the student in safetensors, and
    report.html. Ctrl-C and SIGTERM save first; `--resume` continues, on a CPU bit for bit.

    limbeck distill TEACHER STUDENT DATA writes a recipe with comments beside the run directory,
    prints it, checks it as limbeck check does, and runs it. STUDENT is a model, or a size to which
    the teacher is pruned: "1.5B" parameters, or "12 layers".

    A recipe with `stages` is several such runs, one after the other, each in stages/NAME.

    On several GPUs or processes: torchrun --nproc-per-node 8 -m limbeck distill recipe.yaml
    """
    resume = resume or resume_from is not None
    recipe, overrides = Path(words[0]), words[1:]
    if is_short(words):
        recipe, overrides = write_recipe(words, keep_run=resume or overwrite), []
        Console(stderr=True).print(
            f"{recipe}:\n{recipe.read_text()}", markup=False, highlight=False, soft_wrap=True
        )
    if plan:
        check(recipe, overrides, as_json=as_json)
        return
    if stages := load_stages(recipe, overrides):
        refuse_step(resume_from)
        distill_stages(
            stages, resume=resume, overwrite=overwrite, print_config=print_config, as_json=as_json
        )
        return
    config = load(recipe, overrides)
    if print_config:
        typer.echo(dump(config), nl=False)
        return
    train = partial(
        train_and_show,
        resume=resume,
        overwrite=overwrite,
        resume_from=resume_from,
        as_json=as_json,
    )
    if is_short(words) and not resume and check_and_train(config, train):
        return
    with assemble(config) as run:
        train(run)


def check_and_train(config: RunConfig, train: Callable[[Run], None]) -> bool:
    """Check a run, and train it with the same models; false where they have to be loaded again."""
    with assemble(config) as run:
        with redirect_stdout(sys.stderr):
            verify(run)
        if run.world.mesh is None:
            train(run)
            return True
    del run
    gc.collect()  # the checks sharded the models, which FSDP2 does once
    return False


def train_and_show(
    run: Run, *, resume: bool, overwrite: bool, resume_from: int | None, as_json: bool
) -> None:
    """Train, and print the results."""
    outcome = run.train(resume=resume, overwrite=overwrite, resume_from=resume_from)
    if not run.is_main:
        return
    if as_json:
        typer.echo(json.dumps(outcome.evaluation))
        return
    show(outcome)


def show(outcome: RunResult) -> None:
    """Print the results of a run."""
    console = Console()
    console.print(outcome_table(outcome.evaluation))
    console.print(f"student  {outcome.student}")
    for name, export in outcome.evaluation.get("exports", {}).items():
        file = outcome.student.parent / "exports" / name / export["file"]
        console.print(f"export   {file}  KL to the student {export['parity']['mean_kl']:.2g} nats")
    if outcome.report:
        console.print(f"report   {outcome.report}")


def refuse_step(resume_from: int | None) -> None:
    """Refuse `--resume-from` on a recipe with stages."""
    if resume_from is not None:
        raise ConfigError(
            "--resume-from must be used on a recipe without stages: later stages would need the "
            "new student. Leave it out, or choose another output."
        )


def distill_stages(
    stages: Sequence[Stage], *, resume: bool, overwrite: bool, print_config: bool, as_json: bool
) -> None:
    """Run the stages of a recipe, or print what each of them would be."""
    if print_config:
        for stage in stages:
            typer.echo(f"---\n# stage {stage.name}\n{dump(stage.config)}", nl=False)
        return
    evaluations: dict[str, Any] = {}

    def tell(stage: Stage, outcome: RunResult) -> None:
        evaluations[stage.name] = outcome.evaluation
        if not as_json:
            Console().print(f"\nstage    {stage.name}", style="bold")
            show(outcome)

    run_stages(stages, tell, resume=resume, overwrite=overwrite)
    if as_json and evaluations:
        typer.echo(json.dumps({"stages": evaluations}))
