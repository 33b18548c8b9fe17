"""The page of several runs: which student is nearest to the teacher, and what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from limbeck.report.pages import page
from limbeck.report.plots import Point, scatter
from limbeck.report.run_files import Figure
from limbeck.report.run_report import METRICS
from limbeck.report.words import count, duration, interval, percent


def comparison_page(runs: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page.

    Args:
        runs: Fields of `limbeck.experiment.comparison.ComparedRun`, lowest forward KL first.
    """
    values = {
        "runs": [{**run, "verdict": verdict(run, first=run is runs[0])} for run in runs],
        "table": list(table(runs)),
        "options": [(name, [run["options"][name] for run in runs]) for name in runs[0]["options"]],
        "plot": plot_of(runs),
        "is_paired": all(run["behind"] is not None for run in runs[1:]),
    }
    return page("comparison.html", values)


def verdict(run: Mapping[str, Any], *, first: bool) -> str:
    """How a run compares with the first, in words."""
    behind = run["behind"]
    if first:
        return "lowest forward KL"
    if behind is None:
        return "another teacher (or form of it) or other test documents: not comparable"
    by = f"{interval(Figure(**behind))} nats"
    return f"{by} higher" if behind["low"] > 0 else f"not distinguishable from the first: {by}"


def table(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, list[str]]]:
    """Rows of the table: a label, its meaning, and a value for each run."""
    for name in runs[0]["figures"]:
        metric = METRICS[name]
        found = [run["figures"].get(name) for run in runs]
        figures = [None if figure is None else Figure(**figure) for figure in found]
        yield metric.label, metric.meaning, [interval(each, metric.shown) for each in figures]
    for task in sorted({task for run in runs for task in run["tasks"]}):
        scores = [run["tasks"].get(task) for run in runs]
        shown = [None if score is None else Figure(**score) for score in scores]
        yield task, "task", [interval(each, percent) for each in shown]
    yield "Parameters", "of the student", [count(run["parameters"]) for run in runs]
    speeds = [count(run["tokens_per_second"]) for run in runs]
    yield "Tokens a second", "read by the student, on the machine of its run", speeds
    yield "Tokens", "trained on", [count(run["tokens"]) for run in runs]
    yield "Training", "time in steps", [duration(run["seconds"]) for run in runs]


def plot_of(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Forward KL by parameters; None where fewer than two runs have a size."""
    points = [
        Point(
            label=run["name"],
            x=run["parameters"] / 1e6,
            y=run["figures"]["forward_kl"]["value"],
            low=run["figures"]["forward_kl"]["low"],
            high=run["figures"]["forward_kl"]["high"],
            is_marked=run["is_efficient"],
        )
        for run in runs
        if run["parameters"] is not None
    ]
    if len({point.x for point in points}) < 2:
        return None
    title = "Forward KL to the teacher by the student's parameters"
    return scatter("size", title, points, "million parameters", "nats a token")
