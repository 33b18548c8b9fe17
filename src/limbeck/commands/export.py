"""`limbeck export`: a student as a file for another runtime, verified there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from limbeck.commands.arguments import argument, option
from limbeck.commands.shrink import require_new
from limbeck.data import corpus_path
from limbeck.export import HeldOutText, export_student, exporters, open_student
from limbeck.export.base import Exporter
from limbeck.export.publishing import open_teacher
from limbeck.files import size

QUANTIZE = (
    "gguf: f32, f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0; "
    "executorch: f32 (default), 8da8w or 8da4w; safetensors: f32, f16 or bf16 (default)."
)
GROUP_SIZE = "8da4w: weights that share a scale, 32 (default), 64, 128 or 256."
POSITIONS = "executorch: longest sequence; the student's own limit by default."


def export(
    student: Annotated[Path, argument(help="A student's folder, or a run's directory.")],
    *,
    output: Annotated[Path, option(help="New folder to write.")],
    format: Annotated[str, typer.Option(help="gguf, onnx, executorch or safetensors.")] = "gguf",
    quantize: Annotated[str | None, option(help=QUANTIZE)] = None,
    group_size: Annotated[int | None, option(help=GROUP_SIZE)] = None,
    positions: Annotated[int | None, option(help=POSITIONS)] = None,
    max_kl: Annotated[
        float | None,
        option(help="Largest allowed mean KL to the student, nats; by default that of the format."),
    ] = None,
    data: Annotated[
        str | None, option(help="Held-out text to compare on; limbeck's own by default.")
    ] = None,
    data_type: Annotated[str, typer.Option(help="text, completion or chat.")] = "text",
    tokens: Annotated[int, typer.Option(min=2, help="Positions of held-out text.")] = 2048,
    calibration: Annotated[
        str | None, option(help="Text for an importance matrix, which K-quants use.")
    ] = None,
    teacher: Annotated[Path | None, option(help="Show the KL to this teacher as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print parity.json.")] = False,
) -> None:
    """Write a student for llama.cpp, Ollama, ONNX Runtime or ExecuTorch, and verify it there.

    The file is run in its runtime on held-out text, and its logits, tokenisation, special tokens
    and chat template are compared with the student's. A file that differs is not published.
    Each format needs the extra of its name, gguf the extra `export`.

    Examples: limbeck export runs/x --quantize q8_0 --output exports/x;
    limbeck export runs/x --format onnx --output exports/onnx
    """
    options = {"quantize": quantize, "max_kl": max_kl, "calibration": calibration}
    options |= {"group_size": group_size, "positions": positions}
    options |= {"calibration_type": calibration and data_type}
    exporter = chosen(format, options)
    require_new(output, plan=False)
    exporter.require()
    text = HeldOutText(data_type, data or str(corpus_path("heldout")), tokens)
    with Console(stderr=True).status("Loading the student ...") as status:
        opened = open_student(student)
        reference = None if teacher is None else open_teacher(teacher, opened)
        report = export_student(exporter, opened, output, text, reference, status.update)
    typer.echo(json.dumps(report)) if as_json else Console().print(page(report, output))


def chosen(format: str, options: Mapping[str, Any]) -> Exporter:
    """The exporter of a format, with the options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    return exporters.bind({"type": format, **given}, "export")()


def page(report: Mapping[str, Any], output: Path) -> RenderableType:
    """What was written and measured."""
    parity = report["parity"]
    table = Table(
        title="The file in its runtime, beside the student",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=False,
    )
    change = parity["exported_perplexity"] / parity["student_perplexity"] - 1
    long = f"mean KL in a window of {parity['long_window']:,}"
    for name, value in (
        ("positions", f"{parity['positions']:,}"),
        ("mean KL, nats", f"{parity['mean_kl']:.2g} (at most {parity['max_kl']:g})"),
        ("99 % of positions below", f"{parity['kl_99']:.2g}"),
        (long, f"{parity['long_kl']:.2g}"),
        ("same top token", f"{parity['same_top']:.2%}"),
        ("perplexity", f"{parity['exported_perplexity']:.3f} ({change:+.2%})"),
        *teacher_rows(parity["teacher_kl"]),
        ("tokenisation, BOS, EOS, chat template", "equal"),
    ):
        table.add_row(name, value)
    file = f"{output / report['file']}  {size(report['bytes'])}"
    return Group(table, *report["notes"], file)


def teacher_rows(distance: Mapping[str, float] | None) -> list[tuple[str, str]]:
    """KL to the teacher of the student and of the file."""
    if distance is None:
        return []
    student, exported = distance["student"], distance["exported"]
    return [
        ("KL to the teacher", f"{exported:.3f} (student {student:.3f}; {exported - student:+.3f})")
    ]
