"""`limbeck shrink`: a student from the teacher, by taking out what matters least."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table

from limbeck.data import corpus_path
from limbeck.errors import ConfigError, StorageError
from limbeck.experiment import vocabulary as trimming
from limbeck.experiment.shrink import (
    Bench,
    Shrunk,
    as_plain,
    open_bench,
    plan,
    save_shrunk,
    spec_for,
)
from limbeck.experiment.shrink import shrink as make_student
from limbeck.experiment.vocabulary import Trimming, is_table
from limbeck.models import ModelSource, choose_device
from limbeck.prune.targets import count_of
from limbeck.registry import Component
from limbeck.students.depth import By

WAYS = ("even", "block_influence", "span", "loss")
SHAPES = ("depth", "width", "both")
WIDTHS = ("intermediate", "heads", "kv_heads", "hidden")
Output = Annotated[
    Path | None, typer.Option(help="Folder for the student; new.", show_default=False)
]
Share = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Share of the parameters.", show_default=False),
]
Count = Annotated[
    str | None, typer.Option(help="At most so many parameters: 60M.", show_default=False)
]
Shape = Annotated[str, typer.Option(help="What --keep and --params cut: depth, width or both.")]
Way = Annotated[
    str, typer.Option(help="How layers are chosen: even, block_influence, span or loss.")
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Calibration text; that of --vocabulary, or what ships with limbeck.",
        show_default=False,
    ),
]
Vocabulary = Annotated[
    list[str] | None,
    typer.Option(
        help="Keep the tokens these data use, or a vocabulary.json says; repeatable.",
        show_default=False,
    ),
]
Plan = Annotated[
    bool, typer.Option("--plan", help="Propose three shapes, measured; write nothing.")
]


def shrink(
    teacher: Annotated[str, typer.Argument(help="Folder or hub name.", show_default=False)],
    *,
    output: Output = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers to keep.", show_default=False)
    ] = None,
    keep: Share = None,
    params: Count = None,
    shape: Shape = "depth",
    intermediate: Annotated[
        int | None, typer.Option(min=1, help="Neurons of each MLP to keep.", show_default=False)
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Query heads of each layer to keep.", show_default=False),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Key-value heads of each layer to keep.", show_default=False),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden size to keep.", show_default=False)
    ] = None,
    by: Way = "loss",
    vocabulary: Vocabulary = None,
    data: Text = None,
    data_type: Annotated[str, typer.Option(help="A type of data.type.")] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="Of calibration text.")] = 2048,
    plan: Plan = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Annotated[str | None, typer.Option(show_default=False)] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Make a student out of a teacher: some of its layers, its widest parts, or its used tokens.

    Writes an ordinary Hugging Face folder to start a distillation from (student: {type: pretrained,
    path: DIR}), with limbeck.json (what was kept of whom), importance.json and importance.svg, and
    vocabulary.json where tokens were left out.

    Examples: limbeck shrink TEACHER --output student --layers 20;
    limbeck shrink TEACHER --params 60M --plan;
    limbeck shrink TEACHER --vocabulary data.jsonl --output trimmed-teacher
    """
    widths = dict(zip(WIDTHS, (intermediate, heads, kv_heads, hidden), strict=True))
    asked = {"layers": layers, "keep": keep, "params": params, **widths}
    trimmed = tuple(vocabulary or ())
    way = require_one_size(asked, shape=shape, by=by, plan=plan, vocabulary=trimmed)
    require_new(output, plan=plan)

    place = Place(
        ModelSource(teacher, revision, trust_remote_code),
        kind=data_type,
        data=data or next((p for p in trimmed if not is_table(p)), str(corpus_path("train"))),
        tokens=tokens,
        device=device,
        vocabulary=trimmed,
    )
    with Console(stderr=True).status("Loading the teacher ...") as status:
        if plan:
            told: Outcome = propose(place.bench(), asked, way, status)
        elif all(value is None for value in asked.values()):
            told = trim_only(place, output, status)
        else:
            bench = place.bench()
            told = make(bench, spec_of(bench, asked, shape, way), output, status)
    typer.echo(json.dumps(told.plain)) if as_json else Console().print(told.shown)


class Place(NamedTuple):
    """Where teacher and text are."""

    source: ModelSource
    kind: str
    data: str
    tokens: int
    device: str
    vocabulary: tuple[str, ...]

    def bench(self) -> Bench:
        """Both, opened; the vocabulary trimmed if asked for."""
        return open_bench(
            self.source,
            kind=self.kind,
            data=self.data,
            tokens=self.tokens,
            device=choose_device(self.device),
            vocabulary=self.vocabulary,
        )


class Outcome(NamedTuple):
    """What the command has to say, for a program and for people."""

    plain: Any
    shown: RenderableType


def trim_only(place: Place, output: Path | None, status: Status) -> Outcome:
    """The teacher with fewer tokens and all of its layers, measured and saved."""
    assert output is not None, "require_new asks for it"
    teacher = trimming.open_teacher(place.source, choose_device(place.device))
    status.update("Trimming the vocabulary ...")
    made = trimming.trim(teacher, place.vocabulary, place.kind)
    text = trimming.read(place.data, place.kind, made.tokenizer, made.model.max_positions)
    made = trimming.measured(made, text, place.tokens)
    trimming.save_trimmed(made, output)
    return Outcome({"vocabulary": made.facts}, f"{vocabulary_told(made)}\nmodel  {output}")


def propose(bench: Bench, asked: Mapping[str, Any], by: By, status: Status) -> Outcome:
    """Three shapes, measured."""
    found = plan(bench, target_of(bench, asked), by, status.update)
    return Outcome(found, plan_table(found))


def make(bench: Bench, spec: Component, output: Path | None, status: Status) -> Outcome:
    """A student, measured and saved."""
    assert output is not None, "require_new asks for it"
    found = make_student(bench, spec, status.update)
    save_shrunk(bench, found, output)
    told = {} if bench.trimming is None else {"vocabulary": bench.trimming.facts}
    return Outcome(as_plain(found) | told, page(bench, found, output))


def require_one_size(
    asked: Mapping[str, Any], *, shape: str, by: str, plan: bool, vocabulary: Sequence[str] = ()
) -> By:
    """How layers are chosen; a size told in no way, or in two that contradict, is refused.

    A vocabulary that is trimmed is size enough.

    Raises:
        ConfigError: Naming what was told.
    """
    for name, told, known in (("--by", by, WAYS), ("--shape", shape, SHAPES)):
        if told not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {told!r}.")
    given = [name for name, value in asked.items() if value is not None]
    targets = [name for name in ("keep", "params") if name in given]
    told = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "nothing"
    if plan and (not targets or given != targets[:1]):
        raise ConfigError(
            f"A plan needs a target, --keep 0.5 or --params 60M, and nothing else, got {told}."
        )
    if (not given and not vocabulary) or (targets and len(given) > 1):
        raise ConfigError(
            "A student's size is told by --keep 0.5, or --params 60M, or --layers and --hidden, "
            f"--intermediate, --heads, --kv-heads as wanted, got {told}. Give one of the three."
        )
    if asked["keep"] == 0:
        raise ConfigError("--keep must be above 0, a share of the parameters, got 0. Try 0.5.")
    way: By = by  # type: ignore[assignment]  # one of WAYS, looked up above
    return way


def require_new(output: Path | None, *, plan: bool) -> None:
    """Refuse an output that cannot be, or would be written over, before anything is measured.

    Raises:
        ConfigError: It is missing, or there already; or a plan is to write something.
        StorageError: It may not be written.
    """
    if plan and output is not None:
        raise ConfigError(
            f"A plan writes nothing, and --output {output} was given. Leave out one of the two."
        )
    if plan:
        return
    if output is None:
        raise ConfigError("--output must name a folder for the student. Or ask for a --plan only.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output must be new, and {output} holds something. Choose another.")
    above = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StorageError(
            f"--output must be in a folder that can be written, and {above} is none. Choose "
            "another place."
        )


def target_of(bench: Bench, asked: Mapping[str, Any]) -> int:
    """The number of parameters asked for."""
    if asked["params"] is not None:
        return count_of(asked["params"])
    share: float = asked["keep"]
    return round(share * bench.teacher.num_parameters)


def spec_of(bench: Bench, asked: Mapping[str, Any], shape: str, by: By) -> dict[str, Any]:
    """The `student:` of a recipe that says the same."""
    if asked["keep"] is not None or asked["params"] is not None:
        return spec_for(bench, target_of(bench, asked), shape, by)
    told = {"by": by, "calibration_tokens": bench.tokens}
    widths = {name: asked[name] for name in WIDTHS if asked[name] is not None}
    if not widths:
        return {"type": "depth", "keep": asked["layers"], **told}
    depth = {} if asked["layers"] is None else {"layers": asked["layers"]}
    return {"type": "width", **widths, **depth, **told}


def page(bench: Bench, found: Shrunk, output: Path) -> RenderableType:
    """What was measured and made."""
    student, kept = found.student.model, set(found.student.facts["layers_kept"])
    table = Table(title="Layers of the teacher", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("layer", "block influence", "KL without it", "CE without it", ""):
        table.add_column(heading, justify="right")
    for each in found.importance:
        stays = each["layer"] in kept
        numbers = [each["block_influence"], each["forward_kl"], each["cross_entropy"]]
        cells = [str(each["layer"]), *(f"{value:.4f}" for value in numbers)]
        table.add_row(*cells, "" if stays else "taken out", style="" if stays else "dim")
    share = student.num_parameters / bench.teacher.num_parameters
    told = (
        f"{student.num_parameters:,} parameters, {share:.1%} of the teacher's; before healing KL "
        f"{found.cost.forward_kl:.3f}, CE {found.cost.cross_entropy:.3f} nats on "
        f"{bench.held_out.num_tokens:,} held-out tokens.\nstudent  {output}"
    )
    others = [choice_table(found.candidates)] if found.candidates else []
    words = [] if bench.trimming is None else [vocabulary_told(bench.trimming)]
    return Group(table, *others, *words, told)


def vocabulary_told(trimming: Trimming) -> str:
    """What became of a vocabulary."""
    facts, mass = trimming.facts, trimming.facts["mass"]
    whole, left = trimming.teacher.model, trimming.model
    used = f", {facts['used']:,} of them used by the data" if "used" in facts else ""
    return (
        f"{facts['kept']:,} of {facts['of']:,} tokens kept{used}; {left.num_parameters:,} of "
        f"{whole.num_parameters:,} parameters, a head of {left.width} x {left.vocabulary_rows:,}.\n"
        f"Of the whole teacher's probability {mass['kept']:.2%} is on them, at {mass['tokens']:,} "
        f"positions of {mass['text']} ({mass['nats']:.4f} nats)."
    )


def choice_table(candidates: Sequence[Mapping[str, Any]]) -> Table:
    """What as many layers cost, chosen in each way."""
    title = "As many layers, before healing, on held-out rows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("chosen by", "KL", "CE", "layers"):
        table.add_column(heading, overflow="fold")
    for way in candidates:
        layers = ", ".join(map(str, way["layers"]))
        numbers = (f"{way['forward_kl']:.3f}", f"{way['cross_entropy']:.3f}")
        table.add_row(str(way["by"]), *numbers, layers)
    return table


def plan_table(proposed: Sequence[Mapping[str, Any]]) -> Table:
    """Three shapes, the nearest to the teacher first."""
    title = "Shapes of that size before healing, the nearest to the teacher first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    headings = ("shape", "layers", "widths", "parameters", "memory", "speed", "KL", "CE")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for each in proposed:
        names = {"width": "hidden", "inner": "units", "heads": "heads", "kv_heads": "kv"}
        widths = each["widths"]
        told = ", ".join(f"{word} {widths[n]}" for n, word in names.items() if n in widths)
        table.add_row(
            each["shape"],
            str(each["layers"]),
            told or "as the teacher",
            f"{each['parameters']:,}",
            f"{each['bytes'] / 1e6:,.0f} MB",
            f"{each['tokens_per_second']:,.0f}/s, {each['speed_ratio']:.2f} x",
            f"{each['forward_kl']:.3f}",
            f"{each['cross_entropy']:.3f}",
        )
    return table
