"""The demo's second part: a teacher is recorded once, and two students train from the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from limbeck.config import RunConfig
from limbeck.data import corpus_path
from limbeck.experiment import assemble, load
from limbeck.recording import Recording
from limbeck.report.words import TRIALS

TEMPERATURES = (1.0, 2.0)
"""Of the two students; the store serves both."""

Say = Callable[[Console, str, str], None]


def second_act(console: Console, say: Say, teacher: Path, output: Path, steps: int | None) -> None:
    """Record the teacher, then train two students from the store."""
    config = configure(teacher, output, steps)
    say(
        console,
        "2. Recorded once",
        "The teacher reads each window of the text once. Of every distribution the 64 likeliest "
        "tokens stay, with the total probability of all others at two temperatures. Changed text "
        "is reported as missing from the store. After Ctrl-C the same command continues.",
    )
    with Recording(config) as recording:
        done = recording.record((0, 1), None, lambda: None)
    console.print(f"   store    {done.store}: {done.scored:,} tokens in {done.shards} shards")
    say(
        console,
        "3. Two students, no teacher",
        "Both learn from the store, one at each temperature. They are cut out of the teacher's "
        "weights, which are let go then: no step needs a pass of it.",
    )
    trials: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        with assemble(learner(config, temperature)) as run:
            outcome = run.train(overwrite=(run.folder / "recipe.yaml").exists())
        trials.setdefault(TRIALS["initial"], outcome.evaluation["trials"]["initial"])
        trials[f"{TRIALS['distilled']} at T = {temperature:g}"] = outcome.evaluation["trials"][
            "distilled"
        ]
    say(
        console,
        "4. The results",
        "On held-out text, recorded in the same store. A top-k store gives a lower bound of the "
        "distance to the teacher, up to rounding. The first act's student learns longer.",
    )
    console.print(table(trials))


def configure(teacher: Path, output: Path, steps: int | None) -> RunConfig:
    """The recipe of the second act, with this machine's paths."""
    paths = (f"student.path={teacher}", f"record.output={output / 'store'}")
    return shipped_recipe("demo_store.yaml", teacher, output, steps, paths)


def shipped_recipe(
    name: str, teacher: Path, output: Path, steps: int | None, more: Sequence[str] = ()
) -> RunConfig:
    """A recipe that ships with limbeck, with this machine's paths."""
    overrides = [
        f"teacher.path={teacher}",
        f"data.path={corpus_path('train')}",
        f"evaluate.data={corpus_path('heldout')}",
        f"output={output}",
        *more,
        *([] if steps is None else [f"optim.steps={steps}"]),
    ]
    with as_file(files("limbeck.commands") / "recipes" / name) as recipe:
        return load(recipe, overrides)


def learner(config: RunConfig, temperature: float) -> RunConfig:
    """The recipe of one student that trains from the store."""
    assert config.record is not None
    return replace(
        config,
        teacher={"type": "stored", "path": str(config.record.output)},
        objective=replace(config.objective, temperature=temperature),
        output=config.output / f"student-{temperature:g}",
    )


def table(trials: dict[str, Any]) -> Table:
    """Forward KL and cross-entropy of every student."""
    shown = Table(box=box.SIMPLE_HEAD, header_style="bold")
    shown.add_column("student")
    shown.add_column("KL, at least", justify="right")
    shown.add_column("CE, nats", justify="right")
    for name, figures in trials.items():
        cells = [f"{figures[m]['value']:.3f}" for m in ("forward_kl", "cross_entropy")]
        shown.add_row(name, *cells)
    return shown
