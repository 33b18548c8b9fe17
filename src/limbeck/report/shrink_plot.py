"""The importance of a teacher's layers, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from limbeck.report.plots import style, svg_of

KEPT, GONE, INK = "#2f6f9f", "#d9a441", "#444444"


def shrink_plot(found: Mapping[str, Any]) -> str:
    """An SVG file: two measures of every layer, and what each way to choose layers costs."""
    layers = found["importance"]
    kept = set(found["made"]["layers_kept"])
    places = [each["layer"] for each in layers]
    colours = [KEPT if place in kept else GONE for place in places]
    with matplotlib.rc_context(style(INK, "shrink")):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        loss, influence, costs = figure.subplots(3, 1, height_ratios=(3, 3, 2))
        loss.bar(places, [each["forward_kl"] for each in layers], color=colours)
        loss.set_yscale("log")
        loss.set_title("Forward KL to the teacher without this layer alone, nats", loc="left")
        influence.bar(places, [each["block_influence"] for each in layers], color=colours)
        influence.set_yscale("log")
        influence.set_title("Block influence (1 - cosine of input and output)", loc="left")
        influence.set_xlabel("layer; blue stays in the student")
        ways = found["candidates"]
        names = [f"{way['by']}, {len(way['layers'])} layers" for way in ways]
        costs.barh(names, [way["forward_kl"] for way in ways], color=KEPT)
        costs.set_title("Forward KL before distillation, by choice of layers", loc="left")
        return svg_of(figure)
