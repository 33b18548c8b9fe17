"""The page and the tables of a forecast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from limbeck.report.pages import page
from limbeck.report.plots import COLOURS, SETTINGS, inline, style, svg_of
from limbeck.report.run_files import Figure
from limbeck.report.sections import STUDENTS, Cell, Table, figure_cell
from limbeck.report.words import MISSING, TRIALS, count, duration, interval, number, percent

METRICS = {"forward_kl": "KL", "cross_entropy": "CE"}
COLOUR = {"distilled": "student", "cross_entropy": "baseline"}


def forecast_page(found: Mapping[str, Any], name: str) -> str:
    """One self-contained HTML page.

    Args:
        found: Contents of forecast.json.
        name: Of the recipe's output.
    """
    values = {
        "name": name,
        "sentences": list(sentences(found)),
        "plot": curve_plot(found),
        "tables": tables(found),
    }
    return page("forecast.html", values)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """All tables of the page."""
    other = [] if found["against"] is None else [against_table(found)]
    return [answer_table(found), *other, pilots_table(found)]


def students_of(found: Mapping[str, Any]) -> list[str]:
    """The students of a forecast, the distilled one first."""
    return [name for name in STUDENTS if name in found["students"]]


def sentences(found: Mapping[str, Any]) -> Iterator[str]:
    """The answer in words."""
    recipe = next(row for row in found["rows"] if row["budget"] == "recipe")
    by = {name: figure_of(recipe[name][found["metric"]]) for name in students_of(found)}
    metric = found["metric"]
    label = "forward KL" if metric == "forward_kl" else "cross-entropy"
    yield (
        f"With the recipe's {recipe['tokens']:,} tokens the student's {label} will be "
        f"{interval(by['distilled'])} nats a token, after "
        f"{duration(3600 * recipe['hours']['distilled'])} of training steps."
    )
    if alone := by.get("cross_entropy"):
        yield f"Trained with cross-entropy only it will be {interval(alone)}."
    if (target := found["target"]) is not None:
        yield target_sentence(target)
    if (other := found["against"]) is not None:
        yield against_sentence(other)
    fit = found["students"]["distilled"][metric]
    yield (
        f"The curve is {number(fit['E'])} + {fit['B']:.3g} / tokens^{number(fit['beta'])}; runs "
        f"vary around it by {percent(fit['run_noise'])}. Intervals hold 95 %: documents, runs "
        "and the curve's parameters vary. They do not know of a change of the curve's form "
        "beyond the pilots."
    )


def figure_of(figure: Mapping[str, float] | None) -> Figure | None:
    """A figure of forecast.json; None where the pilots do not determine it."""
    return None if figure is None else Figure(**figure)


def target_sentence(target: Mapping[str, Any]) -> str:
    """Tokens and hours to a forward KL."""
    tokens, hours = target["tokens"], target["hours"]
    begin = f"A forward KL of {number(target['forward_kl'])}"
    if tokens["low"] is None:
        return f"{begin} is below what the curve reaches with any number of tokens."
    if tokens["value"] is None:
        return (
            f"Whether the student reaches a forward KL of {number(target['forward_kl'])} is not "
            f"determined: from {count(tokens['low'])} tokens, perhaps never."
        )
    most = "no end" if tokens["high"] is None else count(tokens["high"])
    text = (
        " and more text, because this one would be read too often" if target["needs_text"] else ""
    )
    return (
        f"{begin} takes {count(tokens['value'])} tokens [{count(tokens['low'])}, {most}]{text}, "
        f"{duration(3600 * hours['value'])} of training steps."
    )


def against_sentence(other: Mapping[str, Any]) -> str:
    """Which of two recipes is the better buy at the training time of this one."""
    row = next(row for row in other["rows"] if row["budget"] == "recipe")
    gap = figure_of(row["difference"])
    begin = f"In the same {duration(3600 * row['hours'])}"
    if gap is None or gap.low is None or gap.high is None:
        return (
            f"The difference from {other['name']} in the same time is not known: the pilots do not "
            "determine it, or a text would be read too often."
        )
    if gap.low <= 0 <= gap.high:
        return (
            f"{begin} this recipe's figure differs from that of {other['name']} by "
            f"{interval(gap)}: which is the better buy is not decided."
        )
    names = ("this recipe", other["name"])
    better, worse = names if gap.high < 0 else names[::-1]
    gap = -gap if gap.high < 0 else gap
    return f"{begin} {better} is the better buy: {interval(gap)} nats lower than {worse}."


def against_table(found: Mapping[str, Any]) -> Table:
    """Another recipe's figures by budget, and how far this one's differ."""
    other, metric = found["against"], METRICS[found["metric"]]
    heads = ("Time", "Tokens there", f"{metric} there", "Difference", "At equal tokens")
    keys = ("other", "difference", "difference_at_equal_tokens")
    rows = [
        (
            Cell(row["budget"]),
            Cell(duration(3600 * row["hours"])),
            Cell(count(row["tokens"])),
            *(figure_cell(figure_of(row[key])) for key in keys),
        )
        for row in other["rows"]
    ]
    note = (
        f"This recipe's student has {count(found['parameters'])} parameters, the other "
        f"{count(other['parameters'])}. Differences are this recipe's {metric} less the other's, "
        "negative where this one is nearer: after the same time of training steps, and with the "
        f"same tokens. {MISSING}: not determined by the pilots."
    )
    return Table(f"Against {other['name']}", note, ("Budget", *heads), tuple(rows))


def answer_table(found: Mapping[str, Any]) -> Table:
    """Figures by budget."""
    students = students_of(found)
    metrics = [metric for metric in METRICS if metric in found["students"]["distilled"]]
    heads = ["Budget", "Tokens", "Time"]
    heads += [f"{METRICS[metric]}: {TRIALS[name]}" for metric in metrics for name in students]
    rows = []
    for row in found["rows"]:
        cells = [Cell(row["budget"]), Cell(count(row["tokens"]))]
        cells.append(Cell(duration(3600 * row["hours"]["distilled"])))
        for metric in metrics:
            cells += [figure_cell(figure_of(row[name].get(metric))) for name in students]
        rows.append(tuple(cells))
    note = (
        "Nats a token with 95 % prediction intervals. Time of the distilled student's training "
        f"steps at the largest pilot's speed. {MISSING}: not determined by the pilots."
    )
    return Table("What a budget reaches", note, tuple(heads), tuple(rows))


def pilots_table(found: Mapping[str, Any]) -> Table:
    """The pilots as measured."""
    students = students_of(found)
    metrics = [metric for metric in METRICS if metric in found["students"]["distilled"]]
    heads = ["Pilot", "Tokens"]
    heads += [f"{METRICS[metric]}: {TRIALS[name]}" for metric in metrics for name in students]
    rows = [
        (
            Cell(pilot["name"]),
            Cell(f"{pilot['tokens']:,}"),
            *(Cell(number(pilot[name][metric])) for metric in metrics for name in students),
        )
        for pilot in found["pilots"]
    ]
    return Table("Pilots", "Each a finished run.", tuple(heads), tuple(rows))


def curve_plot(found: Mapping[str, Any]) -> Markup:
    """Pilots, fitted curves and their intervals by tokens."""
    metric = found["metric"]
    with matplotlib.rc_context({**style(COLOURS["ink-soft"], "forecast"), **SETTINGS}):
        drawing = Drawing(figsize=(5.6, 3.4))
        axes = drawing.add_axes((0.1, 0.15, 0.88, 0.75))
        for name in students_of(found):
            colour, curve = COLOURS[COLOUR[name]], found["curves"][name]
            tokens = [point["tokens"] for point in curve]
            low, high = ([point[end] for point in curve] for end in ("low", "high"))
            axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(tokens, [p["value"] for p in curve], color=colour, label=TRIALS[name])
            pilots = [(p["tokens"], p[name][metric]) for p in found["pilots"]]
            axes.plot(*zip(*pilots, strict=True), "o", color=colour, markersize=4)
        axes.axvline(found["recipe"]["tokens"], color=COLOURS["rule"], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_title("nats a token", loc="left", fontsize=10.5)
        axes.set_xlabel("training tokens; the line is the recipe", loc="right", labelpad=2)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper right")
        title = "Pilots, and the curve through them with its interval, by training tokens"
        return inline(svg_of(drawing), "forecast", title)
