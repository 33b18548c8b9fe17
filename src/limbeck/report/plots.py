"""Curves of a run as SVG that takes its colours and letters from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MOST_POINTS = 400
COLOURS = {
    "student": "#a10001",
    "baseline": "#a10002",
    "teacher": "#a10003",
    "ink-soft": "#a10004",
    "rule": "#a10005",
    "student-soft": "#a10006",
}
"""Stand-ins, each replaced by the page's own `var(--name)`."""

SETTINGS: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.left": False,
    "axes.edgecolor": COLOURS["rule"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Curve:
    """Points of one line.

    Attributes:
        label: Its name, ours; written beside its end.
        colour: A key of `COLOURS`.
        values: One a step; those that are not finite are left out.
        noisy: Draw it faintly, with a moving mean on top.
    """

    label: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    noisy: bool = False


def plot(name: str, title: str, curves: Sequence[Curve], unit: str) -> Markup:
    """An inline SVG of some curves over optimizer steps.

    Args:
        name: Tells its element ids from those of other plots on the page.
        title: What is to be seen, for those who cannot see it.
    """
    with matplotlib.rc_context({**style(COLOURS["ink-soft"], name), **SETTINGS}):
        figure = Figure(figsize=(4.2, 2.8))
        axes = figure.add_axes((0.12, 0.17, 0.86, 0.71))
        for curve in curves:
            draw(axes, curve)
        axes.set_title(unit, loc="left", fontsize=10.5)
        axes.set_xlabel("optimizer step", loc="right", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.02, y=0.08)
        if len(curves) > 1:
            axes.legend(frameon=False, loc="upper right", handlelength=1.4, borderaxespad=0)
        return inline(svg_of(figure), name, title)


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot.

    Attributes:
        is_marked: Draw it filled.
    """

    label: str
    x: float
    y: float
    low: float
    high: float
    is_marked: bool


def scatter(name: str, title: str, points: Sequence[Point], x_label: str, unit: str) -> Markup:
    """An inline SVG of points with intervals; names and title as for `plot`."""
    with matplotlib.rc_context({**style(COLOURS["ink-soft"], name), **SETTINGS}):
        figure = Figure(figsize=(4.2, 2.8))
        axes = figure.add_axes((0.12, 0.17, 0.78, 0.71))
        for point in points:
            below, above = max(point.y - point.low, 0.0), max(point.high - point.y, 0.0)
            axes.errorbar(
                point.x,
                point.y,
                yerr=[[below], [above]],
                color=COLOURS["student"],
                marker="o",
                markersize=5,
                markerfacecolor=COLOURS["student"] if point.is_marked else "none",
            )
            # A dollar sign would begin a formula.
            label = point.label.replace("$", r"\$")
            axes.annotate(label, (point.x, point.y), xytext=(6, 4), textcoords="offset points")
        axes.set_title(unit, loc="left", fontsize=10.5)
        axes.set_xlabel(x_label, loc="right", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08, y=0.12)
        return inline(svg_of(figure), name, title)


def style(ink: str, name: str) -> dict[Any, Any]:
    """Settings of every plot: letters stay letters, and the same plot is the same file."""
    inks = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    frame = dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    return {"svg.fonttype": "none", "svg.hashsalt": name, **frame, **dict.fromkeys(inks, ink)}


def svg_of(figure: Figure) -> str:
    """A figure as an SVG file, without a date."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def draw(axes: matplotlib.axes.Axes, curve: Curve) -> None:
    """One curve on the axes."""
    steps, values = finite(curve)
    steps, values = thinned(steps), thinned(values)
    colour = COLOURS[curve.colour]
    if curve.noisy and len(values) > 20:
        axes.plot(steps, values, color=COLOURS["student-soft"], linewidth=0.8)
        values = smooth(values)
    marker = "o" if len(values) < 40 and not curve.noisy else "None"
    (line,) = axes.plot(steps, values, color=colour, linewidth=1.8, label=curve.label)
    line.set_marker(marker)
    line.set_markersize(3.5)


def finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where both are numbers."""
    points = [
        (s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(s + v)
    ]
    table = np.array(points or np.empty((0, 2)), dtype=float)
    return table[:, 0], table[:, 1]


def thinned(values: np.ndarray) -> np.ndarray:
    """Means of neighbouring points, so that a long run does not make a long page."""
    groups = np.array_split(values, min(len(values), MOST_POINTS)) if len(values) else []
    return np.array([group.mean() for group in groups])


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a twentieth of the points."""
    half = max(len(values) // 40, 1)
    padded = np.concatenate([np.repeat(values[:1], half), values, np.repeat(values[-1:], half)])
    return np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")


def inline(svg: str, name: str, title: str) -> Markup:
    """A stand-alone SVG file as part of a page, with unique ids and the page's colours.

    matplotlib escapes the labels, and the rest is numbers, so it needs no escaping.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for key, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{key})")
    label = Markup('<svg role="img" aria-label="{}"').format(title)
    return Markup(svg.replace("<svg", label, 1))
