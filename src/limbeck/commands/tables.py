"""Tables that more than one verb prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.report.words import TRIALS

COLUMNS = {
    "forward_kl": ("KL", "{:.3f}"),
    "top1_agreement": ("top-1 agrees", "{:.1%}"),
    "cross_entropy": ("CE, nats", "{:.3f}"),
    "bits_per_byte": ("bits/byte", "{:.3f}"),
}
"""What fits on a terminal with its intervals; the report has the rest."""


def outcome_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """The students against their anchors, with 95 % intervals over documents."""
    if not evaluation.get("trials"):
        return Text("Nothing was measured: the recipe names no held-out text (evaluate.data).")
    title = "Held-out text, against the teacher; 95 % intervals over documents"
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("student")
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for trial, title in TRIALS.items():
        if figures := evaluation["trials"].get(trial):
            cells = [cell(figures.get(name), form) for name, (_, form) in COLUMNS.items()]
            table.add_row(title, *cells, style="bold green" if trial == "distilled" else "")
    return Group(table, *sentences(evaluation))


def cell(figure: Mapping[str, float] | None, form: str) -> str:
    """A figure with its interval, or a dash where it means nothing."""
    if figure is None:
        return "-"
    value, low, high = (form.format(figure[key]) for key in ("value", "low", "high"))
    return value if low == high else f"{value}\n{low}-{high}"


def sentences(evaluation: Mapping[str, Any]) -> list[Text]:
    """What the table says, in words."""
    lines = []
    gap = evaluation.get("gap_recovered_percent", {}).get("distilled")
    if gap:
        low, high = gap["low"], gap["high"]
        if gap["value"] < 0:
            lines.append(
                f"The student ended {-gap['value']:.0f} % [{-high:.0f}, {-low:.0f}] farther (KL) "
                "from the teacher than it started."
            )
        else:
            lines.append(
                f"Distillation closed {gap['value']:.0f} % [{low:.0f}, {high:.0f}] of the distance "
                "(KL) between the initial student and the teacher."
            )
    ahead = evaluation.get("difference", {}).get("forward_kl")
    if ahead:
        is_sure = ahead["low"] > 0 or ahead["high"] < 0
        least = min(abs(ahead["low"]), abs(ahead["high"]))
        digits = 3 if not is_sure or least >= 0.0005 else 6
        value, low, high = (f"{ahead[key]:+.{digits}f}" for key in ("value", "low", "high"))
        sure = "excludes" if is_sure else "includes"
        lines.append(
            f"Trained with cross-entropy only, on the same tokens, the student ends "
            f"{value} nats [{low}, {high}] farther from the teacher than the distilled one: "
            f"the interval, paired by document, {sure} zero."
        )
    return [Text(line) for line in lines]
