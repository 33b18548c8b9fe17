"""Finished cells on disk, and what they come to: tables with intervals, and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from limbeck.evaluate.scores import Interval, Scores, paired_difference, summarise
from limbeck.experiment.score_files import scores
from limbeck.files import write_text
from student_table.plan import BEFORE, MAIN, Cell, settings_of, shapes_of

METRICS = ("forward_kl", "cross_entropy", "top1_agreement")
RESULTS = Path(__file__).parents[1] / "results"
NOTHING = "-"


class Cells:
    """The finished cells of one command line, a line each in WORK/cells.jsonl."""

    def __init__(self, told: argparse.Namespace) -> None:
        self._path: Path = told.work / "cells.jsonl"
        self._settings = settings_of(told)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        found = [json.loads(line) for line in lines]
        self.all: list[dict[str, Any]] = [c for c in found if self._is_mine(c)]
        self._known: dict[tuple[Any, ...], Any] = {}

    def _is_mine(self, cell: dict[str, Any]) -> bool:
        """Whether a cell has these settings; untrained shapes may have any number of tokens."""
        skipped = 2 if cell["arm"] == BEFORE else 0
        return bool(cell["settings"][skipped:] == self._settings[skipped:])

    def has(self, cell: Cell) -> bool:
        """Whether a cell is there."""
        return bool(self.of(cell.shape, cell.arm, cell.seed))

    def of(self, shape: str, arm: str, seed: int | None = None) -> list[dict[str, Any]]:
        """Cells of a shape and an arm, of one seed or all."""
        return [
            cell
            for cell in self.all
            if (cell["shape"], cell["arm"]) == (shape, arm) and seed in (None, cell["seed"])
        ]

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell that was just measured."""
        told = summarise(cell["scores"])
        saved = {
            **cell,
            **{name: told[name] for name in METRICS},
            "settings": self._settings,
            "scores": vars(cell["scores"]),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(saved, default=np.ndarray.tolist) + "\n")
        self.all.append(saved)

    def scores(self, shape: str, arm: str, seeds: Iterable[int] | None = None) -> Scores | None:
        """Of a shape and an arm, summed over its seeds, so that a mean is over them too."""
        kept = None if seeds is None else set(seeds)
        found = [
            each
            for cell in self.of(shape, arm)
            if (kept is None or cell["seed"] in kept)
            and (each := scores(cell["scores"])) is not None
        ]
        if not found:
            return None
        first = found[0]
        metrics = {
            name: np.sum([each.metrics[name] for each in found], axis=0) for name in first.metrics
        }
        return replace(
            first,
            metrics=metrics,
            counts=first.counts * len(found),
            bytes=first.bytes * len(found),
            calibration=np.sum([each.calibration for each in found], axis=0),
        )

    def summary(self, shape: str, arm: str) -> dict[str, Interval] | None:
        """Figures of a shape and an arm over all seeds, with intervals; taken once."""
        pooled = self.scores(shape, arm)
        key = (shape, arm, len(self.of(shape, arm)))
        if pooled is not None and key not in self._known:
            self._known[key] = summarise(pooled)
        return self._known.get(key)

    def difference(self, one: tuple[str, str], other: tuple[str, str]) -> Interval | None:
        """Forward KL of a shape and an arm less another's, over the seeds that both have."""
        seeds = [{cell["seed"] for cell in self.of(*each)} for each in (one, other)]
        both = frozenset(seeds[0] & seeds[1])
        a, b = (self.scores(*each, both) for each in (one, other))
        key = (one, other, both)
        if a is not None and b is not None and key not in self._known:
            self._known[key] = paired_difference(a, b, "forward_kl")
        return self._known.get(key)


class Table:
    """The cells of one command line as Markdown."""

    def __init__(self, told: argparse.Namespace, cells: Cells, arms: Sequence[str]) -> None:
        self._told = told
        self._cells = cells
        self._arms = arms
        self._whole, self._choices = shapes_of(told)

    def text(self) -> str:
        """The page."""
        told = self._told
        some = next((s for shape in self._whole if (s := self._cells.scores(shape, BEFORE))), None)
        measured = "" if some is None else self._measured(some)
        return "\n".join(
            [
                f"# Students of {Path(told.teacher).name}, {told.tokens:,} tokens of training",
                "",
                f"{measured}Intervals: 95 %, bootstrap over held-out documents; where there are "
                "several seeds, of their mean, and then the least and the most of the seeds.",
                "",
                *self._figures("Forward KL to the teacher, nats a token", "forward_kl"),
                *self._figures("Cross-entropy on the text, nats a token", "cross_entropy"),
                *self._figures("Top-1 agreement with the teacher", "top1_agreement"),
                *self._differences(),
                *self._chosen(),
            ]
        )

    def _measured(self, some: Scores) -> str:
        own = summarise(some)["teacher_cross_entropy"]
        return (
            f"Measured on {some.num_tokens:,} tokens of {len(some.documents)} documents, on which "
            f"the teacher's own cross-entropy is {own['value']:.3f}. "
        )

    def _figures(self, title: str, metric: str) -> list[str]:
        rows = [
            f"| shape | parameters | before | {' | '.join(self._arms)} |",
            f"|---|---|---|{'---|' * len(self._arms)}",
        ]
        for shape in self._whole:
            known = self._cells.of(shape, BEFORE)
            size = f"{known[0]['parameters'] / 1e6:.1f} M" if known else NOTHING
            told = [self._figure(shape, arm, metric) for arm in (BEFORE, *self._arms)]
            rows.append(f"| {shape} | {size} | {' | '.join(told)} |")
        return [f"## {title}", "", *rows, ""]

    def _figure(self, shape: str, arm: str, metric: str) -> str:
        found = self._cells.summary(shape, arm)
        if found is None:
            return NOTHING
        told = interval(found[metric])
        each = [cell[metric]["value"] for cell in self._cells.of(shape, arm)]
        return told if len(each) == 1 else f"{told}, {min(each):.3f} to {max(each):.3f}"

    def _differences(self) -> list[str]:
        """Every arm's forward KL less the main one's, over the seeds that both have."""
        others = [arm for arm in self._arms if arm != MAIN]
        rows = []
        for shape in self._whole:
            found = [self._difference((shape, arm), (shape, MAIN)) for arm in others]
            rows.append(f"| {shape} | {' | '.join(found)} |")
        return [
            f"## Forward KL less that of {MAIN}, the same documents drawn for both",
            "",
            f"| shape | {' | '.join(others)} |",
            f"|---|{'---|' * len(others)}",
            *rows,
            "",
        ]

    def _difference(self, one: tuple[str, str], other: tuple[str, str]) -> str:
        found = self._cells.difference(one, other)
        return NOTHING if found is None else interval(found, signed=True)

    def _chosen(self) -> list[str]:
        """Layers chosen in other ways beside those chosen by loss."""
        rows = []
        for shape in self._choices:
            by_loss = shape.partition(":")[0]
            told = [
                self._figure(shape, BEFORE, "forward_kl"),
                self._figure(shape, MAIN, "forward_kl"),
                self._difference((shape, BEFORE), (by_loss, BEFORE)),
                self._difference((shape, MAIN), (by_loss, MAIN)),
            ]
            rows.append(f"| {shape} | {' | '.join(told)} |")
        return [
            f"## How layers are chosen: forward KL, trained with {MAIN}",
            "",
            "| shape | before | after | before, less that of loss | after, less that of loss |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]

    def marks(self) -> list[tuple[str, dict[str, Interval]]]:
        """Forward KL of each trained shape, by loss."""
        drawn = []
        for shape in (*self._whole, *self._choices):
            arms = (BEFORE, *self._arms)
            found = {arm: self._cells.summary(shape, arm) for arm in arms}
            there = {arm: told["forward_kl"] for arm, told in found.items() if told is not None}
            if there:
                drawn.append((shape, there))
        return drawn


def write_results(told: argparse.Namespace, cells: Cells, arms: Sequence[str]) -> Table:
    """students.md and students.json, from the cells that are there."""
    table = Table(told, cells, arms)
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "students.md", table.text())
    short = [{k: v for k, v in cell.items() if k != "scores"} for cell in cells.all]
    lines = ",\n ".join(json.dumps(cell) for cell in short)
    write_text(RESULTS / "students.json", f"[\n {lines}\n]\n")
    return table


def interval(found: Interval, *, signed: bool = False) -> str:
    """A figure with the ends of its interval."""
    form = "+.3f" if signed else ".3f"
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def draw(table: Table, arms: Sequence[str]) -> None:
    """students.svg: forward KL before and after with intervals, one group of marks a shape."""
    marks = table.marks()
    if not marks:
        return
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "students"}):
        shown = Figure(figsize=(7.5, 0.6 * len(marks) + 1.6), layout="constrained")
        axes = shown.subplots()
        for number, arm in enumerate((BEFORE, *arms)):
            points = [(found[arm], place) for place, (_, found) in enumerate(marks) if arm in found]
            if not points:
                continue
            at = [place + 0.12 * (number - len(arms) / 2) for _, place in points]
            middle = [figure["value"] for figure, _ in points]
            ends = [
                [figure["value"] - figure["low"] for figure, _ in points],
                [figure["high"] - figure["value"] for figure, _ in points],
            ]
            colour = "#888" if arm == BEFORE else f"C{number - 1}"
            axes.errorbar(middle, at, xerr=ends, fmt="o", ms=4, lw=1, color=colour, label=arm)
        axes.set_yticks(range(len(marks)), [shape for shape, _ in marks])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("held-out forward KL to the teacher, nats a token")
        axes.legend(frameon=False)
        shown.savefig(RESULTS / "students.svg", metadata={"Date": None})
