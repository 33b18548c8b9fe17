"""The HTML page of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from limbeck.files import write_text
from limbeck.report import story
from limbeck.report.advice import advice
from limbeck.report.pages import page
from limbeck.report.plots import Curve, plot
from limbeck.report.rollout_texts import BeforeAfter, before_after
from limbeck.report.run_files import Evaluation, Figure, RunFiles, is_number, read_run
from limbeck.report.sections import figure_cell, group_tables, seed_tables, set_tables, suite_tables
from limbeck.report.words import TRIALS, number, percent

HELD_OUT = {
    "forward_kl": "Distance to the teacher, held out (forward KL)",
    "cross_entropy": "Distance to the text, held out (cross-entropy)",
}
LONGEST_FACT = 2000


@dataclass(frozen=True)
class Metric:
    """How a metric reads in the table.

    Attributes:
        better: Which value is best: the least, the greatest, or the one nearest 0.
        share: Whether it is a fraction, shown in percent.
        digits: Decimals of one that is not.
    """

    label: str
    meaning: str
    better: str = "least"
    share: bool = False
    digits: int = 3

    def shown(self, value: float | None) -> str:
        """A value of it."""
        return percent(value) if self.share else number(value, self.digits)

    def rank(self, value: float) -> float:
        """Smaller is better."""
        return {"least": value, "greatest": -value, "zero": abs(value)}[self.better]


METRICS = {
    "forward_kl": Metric("Forward KL", "nats a token from the teacher"),
    "reverse_kl": Metric("Reverse KL", "nats a token, seen from the student"),
    "jensen_shannon": Metric("Jensen-Shannon", "nats a token, at most 0.693"),
    "total_variation": Metric("Total variation", "probability put elsewhere", share=True),
    "acceptance": Metric("Shared probability", "accepted as drafts", "greatest", share=True),
    "top1_agreement": Metric("Same first choice", "as the teacher", "greatest", share=True),
    "top5_agreement": Metric("Shared first five", "of the teacher's", "greatest", share=True),
    "cross_entropy": Metric("Cross-entropy", "nats a token on the text itself"),
    "perplexity": Metric("Perplexity", "as if choosing among so many tokens", digits=2),
    "bits_per_byte": Metric("Bits per byte", "comparable across tokenizers"),
    "over_confidence": Metric("Over-confidence", "surer than right, if positive", "zero", True),
    "ece": Metric("Calibration error", "confidence against accuracy", share=True),
    "padded_mass": Metric("Padded mass", "probability of ids that are no token", share=True),
}


def write_report(run_directory: Path) -> Path:
    """Write report.html from what a run left in its directory, and return its path.

    Raises:
        DataError: A file the report needs is missing or damaged.
    """
    run = read_run(run_directory)
    path = run_directory / "report.html"
    write_text(path, run_page(run, before_after(run_directory)))
    return path


def run_page(run: RunFiles, rollouts: Sequence[BeforeAfter] = ()) -> str:
    """The page itself.

    Args:
        rollouts: What the student wrote during the run, first and last.
    """
    evaluation = run.evaluation or Evaluation()
    facts = {who: mapping(run.provenance.get(who)) for who in ("teacher", "student")}
    kept = story.layers_kept(facts["student"])
    depth = evaluation.models.get("teacher", story.NOTHING).layers or facts["teacher"].get("layers")
    values = {
        "run": run,
        "evaluation": evaluation,
        "headline": story.headline(run.evaluation),
        "lede": [
            *story.lede(run.evaluation),
            *story.bounds(facts["teacher"]),
            *story.training(mapping(run.provenance.get("trained"))),
        ],
        "names": {
            "teacher": name_of(facts["teacher"], "the teacher"),
            "student": name_of(facts["student"], f"{run.name}/student"),
        },
        "sizes": {who: evaluation.models.get(who, story.NOTHING) for who in facts},
        "strip": [i in kept for i in range(depth)] if kept and isinstance(depth, int) else [],
        "trials": [(trial, label) for trial, label in TRIALS.items() if trial in evaluation.trials],
        "trial_labels": {**TRIALS, "truth": "The text itself"},
        "table": list(table(evaluation)),
        "rollouts": rollouts,
        "set_tables": [*seed_tables(evaluation), *set_tables(evaluation)],
        "gaps": list(gap_bars(evaluation)),
        "advice": advice(run.evaluation, run.metrics),
        "suite_tables": list(suite_tables(evaluation)),
        "group_tables": list(group_tables(evaluation)),
        "plots": list(plots(run)),
        "speed_ratio": speed_ratio(evaluation),
        "timing": mapping(run.provenance.get("timing")),
        "provenance": list(flat(run.provenance)),
    }
    return page("run.html", values)


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, or an empty one in its place."""
    return value if isinstance(value, Mapping) else {}


def name_of(facts: Mapping[str, Any], otherwise: str) -> str:
    """A model's name; for a path its last part."""
    name = str(facts.get("name") or otherwise)
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def speed_ratio(evaluation: Evaluation) -> float | None:
    """How many times as fast as the teacher the student is."""
    student, teacher = (evaluation.models.get(m, story.NOTHING) for m in ("student", "teacher"))
    return story.ratio(student.tokens_per_second, teacher.tokens_per_second)


def table(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """A row for every metric we have words for and any trial has."""
    for name, metric in METRICS.items():
        figures = {trial: figure_of(evaluation, trial, name) for trial in TRIALS}
        known = {trial: figure for trial, figure in figures.items() if figure is not None}
        rivals = {trial: metric.rank(f.value) for trial, f in known.items() if trial != "teacher"}
        best = min(rivals, key=lambda trial: rivals[trial]) if len(rivals) > 1 else None
        columns = [trial for trial in TRIALS if trial in evaluation.trials]
        if known:
            cells = [cell(metric, figures[trial], trial, trial == best) for trial in columns]
            yield {"metric": metric, "cells": cells}


def figure_of(evaluation: Evaluation, trial: str, metric: str) -> Figure | None:
    """A figure of a trial; None where it was not measured, or is a padded mass of nothing."""
    padded = evaluation.padded_mass.get(trial)
    if metric == "padded_mass" and padded:
        return Figure(padded)
    return evaluation.trials.get(trial, {}).get(metric)


def cell(metric: Metric, figure: Figure | None, trial: str, best: bool) -> dict[str, Any]:
    """One cell of the table."""
    shown = figure_cell(figure, metric.shown)
    label = TRIALS[trial]
    return {"label": label, "value": shown.value, "ends": shown.ends, "best": best}


def gap_bars(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """How much of the gap each trained trial closed, with the ends of its interval, percent."""
    for trial in ("cross_entropy", "distilled"):
        figure = evaluation.gap_recovered_percent.get(trial)
        if figure is not None and math.isfinite(figure.value):
            low = figure.value if figure.low is None else figure.low
            high = figure.value if figure.high is None else figure.high
            left, right = (min(max(end, 0.0), 100.0) for end in (low, high))
            bar = min(max(figure.value, 0.0), 100.0)
            yield {"trial": trial, "figure": figure, "bar": bar, "left": left, "right": right}


def plots(run: RunFiles) -> Iterator[dict[str, Any]]:
    """The loss, and the held-out figures, over the run."""
    loss = curve(run.metrics, "step", "loss", "training loss", "student", noisy=True)
    if loss is not None:
        svg = plot("loss", "The training loss by optimizer step", [loss], "nats")
        yield {"svg": svg, "caption": "Training loss"}
    for metric, caption in HELD_OUT.items():
        ours = curve(run.metrics, "evaluation", metric, TRIALS["distilled"], "student")
        theirs = curve(run.baseline, "evaluation", metric, TRIALS["cross_entropy"], "baseline")
        found: Sequence[Curve] = [c for c in (theirs, ours) if c is not None]
        if found:
            yield {"svg": drawn(metric, caption, found), "caption": caption}


def drawn(name: str, caption: str, curves: Sequence[Curve]) -> Markup:
    """A plot named after its metric."""
    return plot(name.replace("_", "-"), f"{caption}, by optimizer step", curves, "nats a token")


def curve(
    lines: Sequence[Mapping[str, Any]],
    kind: str,
    key: str,
    label: str,
    colour: str,
    *,
    noisy: bool = False,
) -> Curve | None:
    """A metric's curve from the lines of metrics.jsonl; None when it has less than two points."""
    points = [
        (line["step"], line[key])
        for line in lines
        if line.get("kind") == kind and is_number(line.get("step")) and is_number(line.get(key))
    ]
    if len(points) < 2:
        return None
    return Curve(label, colour, [float(s) for s, _ in points], [float(v) for _, v in points], noisy)


def flat(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as lines, each with its path; long lists on one line."""
    for key, value in tree.items():
        path = f"{at}.{key}" if at else str(key)
        if isinstance(value, Mapping):
            yield from flat(value, path)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield path, text[:LONGEST_FACT]
