"""`limbeck shrink`: a student pruned from its teacher."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table

from limbeck.commands.arguments import Device, RemoteCode, argument, option
from limbeck.data import corpus_path
from limbeck.errors import ConfigError, StorageError
from limbeck.experiment import vocabulary as vocabularies
from limbeck.experiment.shrink import (
    SHAPES,
    ShrinkSetup,
    Shrunk,
    as_plain,
    open_shrink,
    plan,
    save_shrunk,
    spec_for,
)
from limbeck.experiment.shrink import shrink as make_student
from limbeck.experiment.vocabulary import PrunedVocabulary, is_table
from limbeck.files import nearest_existing, size
from limbeck.models import ModelSource, choose_device
from limbeck.prune.targets import count_of
from limbeck.registry import Component
from limbeck.report.words import count
from limbeck.students.depth import By

WIDTHS = ("intermediate", "heads", "kv_heads", "hidden")
Layers = Annotated[int | None, option(min=1, help="Layers to keep.")]
Neurons = Annotated[int | None, option(min=1, help="Neurons of each MLP to keep.")]
Heads = Annotated[int | None, option(min=1, help="Query heads of each layer to keep.")]
KvHeads = Annotated[int | None, option(min=1, help="Key-value heads of each layer to keep.")]
Hidden = Annotated[int | None, option(min=1, help="Hidden size to keep.")]
Output = Annotated[Path | None, option(help="New folder for the student.")]
Share = Annotated[float | None, option(min=0.0, max=1.0, help="Share of the parameters to keep.")]
Count = Annotated[str | None, option(help="Largest number of parameters, e.g. 60M.")]
Shape = Annotated[str, typer.Option(help="What --keep and --params reduce: depth, width or both.")]
Way = Annotated[
    str, typer.Option(help="How layers are chosen: even, block_influence, span or loss.")
]
Text = Annotated[
    str | None,
    option(help="Calibration text; by default that of --vocabulary, or limbeck's corpus."),
]
Vocabulary = Annotated[
    list[str] | None,
    option(
        help="Keep only the tokens used in this data, or listed in a vocabulary.json; repeatable."
    ),
]
Revision = Annotated[str | None, option(help="Commit, tag or branch of the teacher.")]
Plan = Annotated[
    bool, typer.Option("--plan", help="Measure three shapes and print them; write nothing.")
]


def shrink(
    teacher: Annotated[str, argument(help="Folder or hub name.")],
    *,
    output: Output = None,
    layers: Layers = None,
    keep: Share = None,
    params: Count = None,
    shape: Shape = "depth",
    intermediate: Neurons = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    hidden: Hidden = None,
    by: Way = "loss",
    vocabulary: Vocabulary = None,
    data: Text = None,
    data_type: Annotated[str, typer.Option(help="Row format of --data, as data.type.")] = "auto",
    tokens: Annotated[int, typer.Option(min=2, help="Positions of calibration text.")] = 2048,
    plan: Plan = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    device: Device = "auto",
) -> None:
    """Prune a teacher into a student: fewer layers, smaller widths, or a smaller vocabulary.

    Writes an ordinary Hugging Face folder to start a distillation from (student: {type: pretrained,
    path: DIR}), with limbeck.json (what was kept of which teacher), importance.json and
    importance.svg, and vocabulary.json if the vocabulary was pruned.

    Examples: limbeck shrink TEACHER --output student --layers 20;
    limbeck shrink TEACHER --params 60M --plan;
    limbeck shrink TEACHER --vocabulary data.jsonl --output pruned-teacher
    """
    widths = dict(zip(WIDTHS, (intermediate, heads, kv_heads, hidden), strict=True))
    asked = {"layers": layers, "keep": keep, "params": params, **widths}
    kept_by = tuple(vocabulary or ())
    way = require_one_size(asked, shape=shape, by=by, plan=plan, vocabulary=kept_by)
    require_new(output, plan=plan)

    place = ShrinkInputs(
        ModelSource(teacher, revision, trust_remote_code),
        kind=data_type,
        data=data or next((p for p in kept_by if not is_table(p)), str(corpus_path("train"))),
        tokens=tokens,
        device=device,
        vocabulary=kept_by,
    )
    with Console(stderr=True).status("Loading the teacher ...") as status:
        if plan:
            outcome: Shown = propose(place.setup(), asked, way, status)
        elif all(value is None for value in asked.values()):
            outcome = prune_vocabulary_only(place, output, status)
        else:
            setup = place.setup()
            outcome = make(setup, spec_of(setup, asked, shape, way), output, status)
    typer.echo(json.dumps(outcome.plain)) if as_json else Console().print(outcome.shown)


class ShrinkInputs(NamedTuple):
    """Teacher and text to load."""

    source: ModelSource
    kind: str
    data: str
    tokens: int
    device: str
    vocabulary: tuple[str, ...]

    def setup(self) -> ShrinkSetup:
        """Teacher and text, loaded; the vocabulary pruned if asked for."""
        return open_shrink(
            self.source,
            kind=self.kind,
            data=self.data,
            tokens=self.tokens,
            device=choose_device(self.device),
            vocabulary=self.vocabulary,
        )


class Shown(NamedTuple):
    """The output of the command, as JSON and as text."""

    plain: Any
    shown: RenderableType


def prune_vocabulary_only(place: ShrinkInputs, output: Path | None, status: Status) -> Shown:
    """Prune the vocabulary and nothing else, measure and save."""
    assert output is not None, "require_new asks for it"
    teacher = vocabularies.open_teacher(place.source, choose_device(place.device))
    status.update("Pruning the vocabulary ...")
    made = vocabularies.prune_vocabulary(teacher, place.vocabulary, place.kind)
    text = vocabularies.read(place.data, place.kind, made.tokenizer, made.model.max_positions)
    made = vocabularies.measured(made, text, place.tokens)
    vocabularies.save_pruned(made, output)
    return Shown({"vocabulary": made.facts}, f"{vocabulary_summary(made)}\nmodel  {output}")


def propose(setup: ShrinkSetup, asked: Mapping[str, Any], by: By, status: Status) -> Shown:
    """Three shapes, measured."""
    found = plan(setup, target_of(setup, asked), by, status.update)
    return Shown(found, plan_table(found))


def make(setup: ShrinkSetup, spec: Component, output: Path | None, status: Status) -> Shown:
    """A student, measured and saved."""
    assert output is not None, "require_new asks for it"
    found = make_student(setup, spec, status.update)
    save_shrunk(setup, found, output)
    vocabulary = {} if setup.pruned is None else {"vocabulary": setup.pruned.facts}
    return Shown(as_plain(found) | vocabulary, page(setup, found, output))


def require_one_size(
    asked: Mapping[str, Any], *, shape: str, by: str, plan: bool, vocabulary: Sequence[str] = ()
) -> By:
    """How layers are chosen, after checking that exactly one size was given.

    A pruned vocabulary counts as a size.
    """
    for name, value, known in (("--by", by, get_args(By)), ("--shape", shape, SHAPES)):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    given = [name for name, value in asked.items() if value is not None]
    targets = [name for name in ("keep", "params") if name in given]
    options = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "nothing"
    if plan and (not targets or given != targets[:1]):
        raise ConfigError(
            f"A plan needs a target, --keep 0.5 or --params 60M, and nothing else, got {options}."
        )
    if (not given and not vocabulary) or (targets and len(given) > 1):
        raise ConfigError(
            "A student's size is given by --keep 0.5, by --params 60M, or by any of --layers, "
            f"--hidden, --intermediate, --heads and --kv-heads, got {options}. Use one of these."
        )
    if asked["keep"] == 0:
        raise ConfigError("--keep must be above 0, a share of the parameters, got 0. Try 0.5.")
    way: By = by  # type: ignore[assignment]  # one of them, looked up above
    return way


def require_new(output: Path | None, *, plan: bool) -> None:
    """Refuse an output that cannot be written or exists, before anything is measured."""
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
    above = nearest_existing(output)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StorageError(
            f"--output must be in a folder that can be written, and {above} is none. Choose "
            "another place."
        )


def target_of(setup: ShrinkSetup, asked: Mapping[str, Any]) -> int:
    """The number of parameters asked for."""
    if asked["params"] is not None:
        return count_of(asked["params"])
    share: float = asked["keep"]
    return round(share * setup.teacher.num_parameters)


def spec_of(setup: ShrinkSetup, asked: Mapping[str, Any], shape: str, by: By) -> dict[str, Any]:
    """The `student:` section of a recipe for the same student."""
    if asked["keep"] is not None or asked["params"] is not None:
        return spec_for(setup, target_of(setup, asked), shape, by)
    choice = {"by": by, "calibration_tokens": setup.tokens}
    widths = {name: asked[name] for name in WIDTHS if asked[name] is not None}
    if not widths:
        return {"type": "depth", "keep": asked["layers"], **choice}
    depth = {} if asked["layers"] is None else {"layers": asked["layers"]}
    return {"type": "width", **widths, **depth, **choice}


def page(setup: ShrinkSetup, found: Shrunk, output: Path) -> RenderableType:
    """Tables of what was measured, and the size of the student."""
    student, kept = found.student.model, set(found.student.facts["layers_kept"])
    table = Table(title="Layers of the teacher", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("layer", "block influence", "KL without it", "CE without it", ""):
        table.add_column(heading, justify="right")
    for each in found.importance:
        stays = each["layer"] in kept
        numbers = [each["block_influence"], each["forward_kl"], each["cross_entropy"]]
        cells = [str(each["layer"]), *(f"{value:.4f}" for value in numbers)]
        table.add_row(*cells, "" if stays else "taken out", style="" if stays else "dim")
    share = student.num_parameters / setup.teacher.num_parameters
    summary = (
        f"{student.num_parameters:,} parameters, {share:.1%} of the teacher's; before distillation "
        f"KL {found.cost.forward_kl:.3f}, CE {found.cost.cross_entropy:.3f} nats on "
        f"{setup.held_out.num_tokens:,} held-out tokens.\nstudent  {output}"
    )
    others = [choice_table(found.candidates)] if found.candidates else []
    words = [] if setup.pruned is None else [vocabulary_summary(setup.pruned)]
    return Group(table, *others, *words, summary)


def vocabulary_summary(pruned: PrunedVocabulary) -> str:
    """Size of a pruned vocabulary, and the probability it keeps."""
    facts, kept = pruned.facts, pruned.facts["kept_probability"]
    whole, left = pruned.teacher.model, pruned.model
    used = f", {facts['used']:,} of them used by the data" if "used" in facts else ""
    return (
        f"{facts['kept']:,} of {facts['of']:,} tokens kept{used}; {left.num_parameters:,} of "
        f"{whole.num_parameters:,} parameters, a head of {left.width} x {left.vocabulary_rows:,}.\n"
        f"The original teacher gives them a probability of {kept['mean']:.2%} on average, at "
        f"{kept['tokens']:,} positions of {kept['text']} ({kept['nats']:.4f} nats)."
    )


def choice_table(candidates: Sequence[Mapping[str, Any]]) -> Table:
    """Cost of as many layers by each method of choice."""
    title = "As many layers, before distillation, on held-out rows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("chosen by", "KL", "CE", "layers"):
        table.add_column(heading, overflow="fold")
    for way in candidates:
        layers = ", ".join(map(str, way["layers"]))
        numbers = (f"{way['forward_kl']:.3f}", f"{way['cross_entropy']:.3f}")
        table.add_row(str(way["by"]), *numbers, layers)
    return table


def plan_table(proposed: Sequence[Mapping[str, Any]]) -> Table:
    """Three shapes, lowest forward KL first."""
    title = "Shapes of that size before distillation, lowest KL first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("shape", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    table.add_column("widths", overflow="fold")
    for heading in ("parameters", "speed", "KL", "CE"):
        table.add_column(heading, no_wrap=True)
    for each in proposed:
        names = {"width": "hidden", "inner": "units", "heads": "heads", "kv_heads": "kv"}
        widths = each["widths"]
        sizes = ", ".join(f"{word} {widths[n]}" for n, word in names.items() if n in widths)
        table.add_row(
            each["shape"],
            str(each["layers"]),
            sizes or "as the teacher",
            f"{count(each['parameters'])}\n{size(each['bytes'])}",
            f"{each['tokens_per_second']:,.0f}/s\n{each['speed_ratio']:.2f} x",
            f"{each['forward_kl']:.3f}",
            f"{each['cross_entropy']:.3f}",
        )
    return table
