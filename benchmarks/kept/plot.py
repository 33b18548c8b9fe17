"""Bytes a token against the error of the gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"dh": "hidden-state gradient", "dw": "head gradient, summed over all tokens"}


def draw(rows: dict[float, list[dict[str, Any]]], path: Path) -> None:
    """A panel a temperature and gradient; families that have several sizes are lines."""
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 4.2 * len(rows)), squeeze=False)
    for line, (temperature, told) in enumerate(rows.items()):
        for panel, (field, name) in enumerate(NAMES.items()):
            axis = axes[line][panel]
            axis.set_prop_cycle(color=[plt.get_cmap("tab20")(place) for place in range(20)])
            families: dict[str, list[dict[str, Any]]] = {}
            for row in told:
                families.setdefault(row["family"], []).append(row)
            for family, unsorted in families.items():
                members = sorted(unsorted, key=lambda row: row["bytes"])
                style = "--x" if "DistillKit" in family or "renorm" in family else "-o"
                axis.plot(
                    [row["bytes"] for row in members],
                    [row[field] for row in members],
                    style,
                    label=family,
                    markersize=4,
                    linewidth=1,
                )
            axis.set(xscale="log", yscale="log", xlabel="bytes a token", ylabel="relative error")
            axis.set_title(f"{name}, temperature {temperature:g}", fontsize=10)
            axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
