"""`limbeck check`: checks of a recipe's models, text and loss before training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.checks import (
    COMPUTE_SHARE,
    HARDWARE,
    LINK_SHARE,
    Case,
    Cluster,
    Excerpt,
    Finding,
    Hardware,
    Plan,
    Proof,
    bfloat16_gain,
    cluster_findings,
    make_plan,
    number_format_notes,
    plan_findings,
    prove,
    prove_unlike,
    quantized_reads_as_well,
    read_hardware,
    text_notes,
    trained_on,
)
from limbeck.commands.arguments import Overrides, argument, option
from limbeck.config import read
from limbeck.config.reading import Needs
from limbeck.data import spread
from limbeck.errors import ConfigError
from limbeck.experiment import Run, assemble
from limbeck.experiment import schema as recipe_schema
from limbeck.experiment.cluster import plan_elsewhere
from limbeck.experiment.loading import problems
from limbeck.experiment.parts import Parts
from limbeck.experiment.repeats import num_students
from limbeck.files import size
from limbeck.models import choose_dtype
from limbeck.registry import type_of
from limbeck.report.words import duration
from limbeck.teachers import find_cross, find_local, require_local
from limbeck.train.micro_batch import choose_micro_batch, free_bytes

NOTED_ROWS = 32
"""Rows, spread over the text, whose special tokens are looked at."""


def check(
    recipe: Annotated[Path | None, argument(help="The recipe, YAML.")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the recipe's JSON schema and exit.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Simulate steps of a cluster; reads no weights and no text.",
        ),
    ] = False,
    world_size: Annotated[
        int | None, option(help="With --plan: number of ranks; 1 by default.")
    ] = None,
    device: Annotated[
        str | None,
        option(
            help=f"With --plan: {', '.join(HARDWARE)}; change figures after commas, as in "
            "h100,memory_gib=94,network_gb_s=25. h100 by default."
        ),
    ] = None,
) -> None:
    """Check models, text and loss of a recipe before training, and estimate memory and time.

    Checks vocabularies, heads, packed documents, the divergence of equal models, gradients and
    micro-batches. Prints which model predicts the text better, which tokens are scored, and an
    estimate of memory, disk and time. Writes nothing. Exit code 2 if a check fails.

    With --plan: memory, collectives and speed on a cluster, simulated from the models' config.json
    files (docs/scale.md).
    """
    if schema:
        typer.echo(json.dumps(recipe_schema(), indent=1))
        return
    if recipe is None:
        raise ConfigError("check needs a recipe: limbeck check recipe.yaml.")
    if plan:
        hardware = read_hardware(device or "h100")
        tell_cluster(recipe, overrides or [], world_size or 1, hardware, as_json=as_json)
        return
    if world_size is not None or device is not None:
        raise ConfigError(
            "--world-size and --device describe the cluster of --plan, which was not given. Add "
            "--plan, or set device=... to choose this machine's."
        )
    with assemble(read(recipe, overrides or [], problems, Needs())) as run:
        if run.world.size > 1:
            raise ConfigError(
                f"check runs in one process, and torchrun started {run.world.size}. Start it as "
                "limbeck check recipe.yaml."
            )
        failing = tell(run, as_json=as_json)
    refuse(failing)


def refuse(failing: list[str]) -> None:
    """End with exit code 2 if something does not hold."""
    if failing:
        raise ConfigError(
            f"{len(failing)} of what must hold before the first step does not: "
            f"{'; '.join(failing)}. The findings say what each means."
        )


def tell_cluster(
    recipe: Path, overrides: list[str], ranks: int, hardware: Hardware, *, as_json: bool
) -> None:
    """Plan a recipe for a cluster, and print the plan."""
    console = Console(stderr=as_json)
    with console.status(f"Simulating a step of {ranks} ranks ..."):
        plan = plan_elsewhere(recipe, overrides, ranks, hardware)
    findings: list[Finding] = list(cluster_findings(plan))
    if as_json:
        failing = [f.name for f in findings if is_failing(f)]
        proofs = [asdict(f) for f in findings]
        typer.echo(json.dumps({"holds": not failing, "proofs": proofs, "plan": asdict(plan)}))
    else:
        console.print(Group(findings_table(findings), plan_table(plan), *assumptions(plan)))
    refuse([f.name for f in findings if is_failing(f)])


def verify(run: Run) -> None:
    """Check a run before it trains, and print the findings.

    Raises:
        ConfigError: A check failed.
    """
    refuse(tell(run, as_json=False))


def tell(run: Run, *, as_json: bool) -> list[str]:
    """Run all checks and print them; returns the names of those that failed."""
    parts, config = run.parts, run.config
    assert parts.student is not None, "the student has been taken"
    run.make_suites()  # they refuse what they cannot measure
    distiller = parts.distiller(parts.student.model, config.objective)
    unlike = find_cross(parts.teacher)
    case = Case(
        distiller,
        config.objective,
        parts.teacher,
        require_local(parts.teacher, "check").model if unlike is None else unlike.model,
        parts.data,
        int(parts.data.facts["largest_token_id"]),
        parts.vocabulary,
        config.evaluate.allow_worse_teacher,
    )
    console = Console(stderr=as_json)
    findings: list[Finding] = []
    with console.status("Proving ...") as status:
        for finding in prove(case) if unlike is None else prove_unlike(case, unlike):
            findings.append(finding)
            status.update(f"Proving ... {finding.name}: done")
        if (teacher := find_local(parts.teacher)) and teacher.whole:
            status.update("Loading the teacher as it was before it was quantised ...")
            text = parts.data if parts.held_out is None else parts.held_out.data
            findings.append(quantized_reads_as_well(case, teacher.whole(), text))
        status.update("Running one micro-batch ...")
        plan = plan_of(run, case)
    findings += plan_findings(plan)
    batches = [parts.data.batch([row]) for row in spread(parts.data.num_rows, NOTED_ROWS)]
    template = None
    if parts.data.is_conversation.any():
        template = "the teacher's chat template, for the student too"
        if unlike is not None:
            template = "each model's own chat template"
    notes = [
        *parts.notes,
        *text_notes(parts.tokenizer, batches, template=template),
        *(number_format_notes(bfloat16_gain()) if is_float32_on_cpu(parts) else ()),
    ]
    example = trained_on(parts.tokenizer, batches[0])
    failing = [f.name for f in findings if is_failing(f)]
    if as_json:
        typer.echo(json.dumps(as_plain(findings, notes, example, plan)))
    else:
        console.print(page(findings, notes, example, plan))
    return failing


def is_float32_on_cpu(parts: Parts) -> bool:
    """Whether the student is computed in float32 on a CPU, and could be in another format."""
    device = parts.world.device
    dtype = choose_dtype(parts.config.parallel.compute_dtype, device)
    has_choice = type_of(parts.config.student) != "shared"  # it computes as its teacher does
    return device.type == "cpu" and dtype == torch.float32 and has_choice


def plan_of(run: Run, case: Any) -> Plan:
    """The plan of a run, after one of its micro-batches."""
    config, world = run.config, run.world
    length = config.data.sequence_length
    micro_batch = choose_micro_batch(
        config.memory,
        case.student,
        world,
        sequence_length=length,
        most_rows=config.optim.rows_per_step(length),
    )
    return make_plan(
        case,
        config,
        micro_batch=micro_batch,
        students=num_students(config),
        free_memory_bytes=free_bytes(world.device),
    )


def is_failing(finding: Finding) -> bool:
    """Whether a finding prevents the run."""
    return isinstance(finding, Proof) and finding.fails


def as_plain(
    findings: Iterable[Finding], notes: list[str], example: list[Excerpt], plan: Plan
) -> dict[str, Any]:
    """All findings, as JSON."""
    findings = list(findings)
    return {
        "holds": not any(is_failing(f) for f in findings),
        "proofs": [asdict(f) for f in findings if isinstance(f, Proof)],
        "unproven": [asdict(f) for f in findings if not isinstance(f, Proof)],
        "notes": notes,
        "example": [segment._asdict() for segment in example],
        "plan": asdict(plan),
    }


def page(
    findings: Iterable[Finding], notes: list[str], example: list[Excerpt], plan: Plan
) -> RenderableType:
    """All findings, as text."""
    note_lines = [Text(f"- {note}") for note in notes]
    heading = [Text("\nNotes", style="bold")] if notes else []
    return Group(
        findings_table(findings), *heading, *note_lines, example_text(example), plan_table(plan)
    )


def findings_table(findings: Iterable[Finding]) -> Table:
    """Table of the checks with their figures, and what it means where one does not hold."""
    table = Table(
        title="Before the first step", title_justify="left", header_style="bold", box=None
    )
    for heading in ("", "what must hold", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        if not isinstance(finding, Proof):
            table.add_row(Text("not proven", "yellow"), finding.name, Text(finding.why))
            continue
        verdict = Text("holds", "green")
        if not finding.holds:
            verdict = Text("FAILS", "bold red") if finding.decides else Text("warning", "yellow")
        found = finding.found if finding.holds else f"{finding.found}\n{finding.meaning}"
        table.add_row(verdict, finding.name, Text(found))
    return table


def example_text(example: Iterable[Excerpt]) -> Text:
    """The start of a row, trained tokens in green."""
    text = Text("\nThe start of the text; ", style="bold")
    text.append("trained tokens in green", style="bold green")
    text.append("\n")
    for segment in example:
        text.append(segment.text, style="green not bold" if segment.scored else "dim not bold")
    return text


def plan_table(plan: Plan) -> Table:
    """Memory, disk and time."""
    table = Table(title="\nThe plan (estimates)", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for who, count in plan.parameters.items():
        table.add_row(f"{who}'s parameters", f"{count:,}")
    table.add_row("parameters trained", f"{plan.trained_parameters:,}")
    for what, num_bytes in plan.memory_bytes.items():
        table.add_row(f"memory: {what}", size(num_bytes))
    table.add_row("memory: in all", size(sum(plan.memory_bytes.values())))
    if plan.host_bytes:
        ranks = plan.cluster.hardware.per_node if plan.cluster else 1
        table.add_row(
            "host memory: teacher's shards",
            f"{size(plan.host_bytes)} a rank, {size(plan.host_bytes * ranks)} a node; copied to "
            "the device in every micro-batch, whose time is not planned",
        )
    table.add_row(
        "a step", f"{plan.micro_batches_per_step} micro-batches of {plan.micro_batch} rows"
    )
    table.add_row("disk: one checkpoint", size(plan.disk.checkpoint_bytes))
    for name, value in cluster_rows(plan, plan.cluster) if plan.cluster else own_rows(plan):
        table.add_row(name, value)
    table.add_row(
        "time",
        f"{duration(plan.seconds)} for {plan.steps:,} steps of {plan.students} student(s); "
        "evaluation and saving not counted",
    )
    return table


def own_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Rows of a plan that was measured on this machine."""
    yield "memory: free beside both models", size(plan.free_memory_bytes)
    yield "disk: the whole run", f"{size(plan.disk.needed_bytes)} of {size(plan.disk.free_bytes)}"
    if plan.passes_over_text is not None:
        yield "the text", f"read {plan.passes_over_text:.2g} times by each student"
    yield "speed", f"{plan.tokens_per_second:,.0f} scored tokens a second, one pass timed"


def cluster_rows(plan: Plan, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Rows of a plan for a cluster."""
    hardware = cluster.hardware
    yield "memory: margin (a guess)", size(cluster.margin_bytes)
    yield "memory: of the device", f"{size(plan.free_memory_bytes)}, {hardware.name}"
    yield "disk: the whole run", size(plan.disk.needed_bytes)
    for each in cluster.collectives:
        apart = "" if each.stride == 1 else f", {each.stride} apart"
        kind = f"collectives: {each.kind} among {each.ranks}{apart}"
        yield kind, f"{each.count:,} a step, {size(each.whole_bytes)} whole"
    yield (
        "compute",
        (
            f"{cluster.flops / 1e15:,.3g} PFLOP a step, {cluster.compute_seconds:.3g} s at "
            f"{COMPUTE_SHARE:.0%} of {hardware.tflops:g} TFLOP/s"
        ),
    )
    yield (
        "communication",
        (
            f"{cluster.communication_seconds:.3g} s a step at {LINK_SHARE:.0%} of "
            f"{hardware.link_gb_s:g} GB/s inside a node, {hardware.network_gb_s:g} GB/s a device "
            "between nodes"
        ),
    )
    yield (
        "speed",
        (
            f"{plan.tokens_per_second:,.0f} tokens a second on {cluster.ranks} ranks if all "
            "communication hides behind computation, "
            f"{cluster.slowest_tokens_per_second:,.0f} if none"
        ),
    )


def assumptions(plan: Plan) -> Iterator[Text]:
    """Assumptions of a plan for a cluster."""
    yield Text(
        "\nMemory is counted from the tensors of a simulated step on rank 0, in which every "
        "position is scored. Times follow from the device's stated figures and the shares above. "
        "Neither was measured on the device. Loading, evaluation and saving are not counted.",
        "dim",
    )
