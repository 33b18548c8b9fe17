"""The results in words, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from head.forms import FORMULAS, OURS, PLAIN

HEADINGS = (
    "form",
    "seconds",
    "x products",
    "x plain",
    "x limbeck",
    "extra MB",
    "of plain's",
    "gradient's distance from ours",
)


def table(results: dict[str, Any]) -> str:
    """One section a size, in Markdown."""
    lines = [
        "# The output head with its loss, beside the peers",
        "",
        "By `benchmarks/loss.py`; how to repeat it, and what each form is: `benchmarks/README.md`.",
        "Only ratios within one table mean something.",
    ]
    for result in results.values():
        lines += ["", *section(result)]
    return "\n".join(lines) + "\n"


def section(result: dict[str, Any]) -> list[str]:
    lines = [
        f"## V = {result['vocabulary']:,}, d = {result['width']:,}, teacher's "
        f"{result['teacher_width']:,}, N = {result['tokens']:,}",
        "",
        f"float32, {result['threads']} thread(s), torch {result['torch']}, medians of "
        f"{result['repeats']}; load of the machine {result['load']:.1f} on {result['cpus']} "
        f"processors. {result['date']}.",
        "",
    ]
    for formula, rows in result["formulas"].items():
        lines += [
            f"**{FORMULAS[formula].words}**",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "|---" * len(HEADINGS) + "|",
            *(line(name, row, rows, result, formula == "stored") for name, row in rows.items()),
            "",
        ]
    return lines


def line(
    name: str, row: dict[str, Any], rows: dict[str, Any], result: dict[str, Any], is_stored: bool
) -> str:
    if "absent" in row:
        return f"| {name} | could not be run here: {row['absent']} |" + " |" * 6
    floors = result["formulas"].get("products", {})
    floor = floors.get("products, stored teacher" if is_stored else "products", {})
    cells = [name, f"{row['seconds']:.2f}"]
    for other in (floor, rows.get(PLAIN, {}), rows.get(OURS, {})):
        cells.append(f"{row['seconds'] / other['seconds']:.2f}" if "seconds" in other else "-")
    ceiling = rows.get(PLAIN, {}).get("extra_mb")
    extra = row.get("extra_mb")
    cells.append("-" if extra is None else f"{extra:,.0f}")
    cells.append("-" if extra is None or not ceiling else f"{extra / ceiling:.1%}")
    cells.append(f"{row['distance']:.0e}" if "distance" in row else "-")
    return f"| {' | '.join(cells)} |"


def picture(results: dict[str, Any], path: Path) -> None:
    """Seconds over the products alone, and extra memory, of every form, a row a size."""
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "limbeck"
    count = len(results)
    figure, places = pyplot.subplots(
        count, 2, figsize=(11, 5.2 * count), squeeze=False, layout="constrained", sharey="row"
    )
    for (left, right), result in zip(places, results.values(), strict=True):
        floor = result["formulas"].get("products", {}).get("products", {}).get("seconds")
        names, times, sizes, colours = [], [], [], []
        for formula, rows in result["formulas"].items():
            for name, row in rows.items():
                if "seconds" in row and formula != "products":
                    names.append(f"{name}: {FORMULAS[formula].words}")
                    times.append(row["seconds"] / (floor or 1))
                    sizes.append(row.get("extra_mb", 0))
                    colours.append("#b5562a" if name.startswith(OURS) else "#8d99a6")
        left.barh(names, times, color=colours)
        left.invert_yaxis()
        left.axvline(1, color="black", linewidth=0.8)
        left.set_xlabel("seconds over those of the four matrix products" if floor else "seconds")
        left.tick_params(axis="y", labelsize=7)
        right.barh(names, sizes, color=colours)
        right.set_xlabel("peak MB beyond inputs and gradients")
        left.set_title(
            f"V = {result['vocabulary']:,}, d = {result['width']:,} / "
            f"{result['teacher_width']:,}, N = {result['tokens']:,}",
            loc="left",
            fontsize=9,
        )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
