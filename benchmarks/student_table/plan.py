"""What the table is made of: its shapes, its losses, and the order in which cells are measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = "24,15,20,10,width:24,width:15"
"""Every arm, and all seeds for those of `--seeded`."""
CHOICES = "24:even,24:block_influence,15:even,15:block_influence"
"""Other layers than those chosen by loss: one arm, one seed."""
MAIN = "kl_ce"
"""The arm of the choices, and the one that differences are taken from."""
CORE = (MAIN, "ce", "kl")
"""Arms that are measured first."""
ARMS = {
    "ce": "objective.alpha=0",
    "kl": "objective.alpha=1",
    "kl_ce": "objective.alpha=0.9",
    "kl_cosine": "objective.alpha=1 "
    "objective.extra=[{type: hidden_state, loss: cosine, weight: 0.5}]",
    "kl_relations": "objective.alpha=1 objective.extra=[{type: relations, weight: 0.1}]",
}
RATES = {"ce": 3e-4}
OTHER_RATE = 6e-4
BEFORE = "before"
"""The trial of a shape before training."""
ROW, STEP = 256, 512
"""Positions of a row, and of an optimizer step."""


@dataclass(frozen=True)
class Cell:
    """One student, or one shape before training.

    Attributes:
        shape: Its name, as `24`, `24:even`, `width:24` or `both:15`.
        arm: The name of a loss, or `before`.
        seed: Which rows, and in which order.
    """

    shape: str
    arm: str
    seed: int


def options(told: str) -> argparse.Namespace:
    """What the command line says.

    Args:
        told: The command's own description.
    """
    parser = argparse.ArgumentParser(
        description=told, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--tokens", type=int, default=10_000, help="training positions of a cell")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seeded", default="24,15", help="shapes that get every seed")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--choices", default=CHOICES, help=f"shapes with {MAIN} only")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--arm", action="append", default=[], help="NAME=OVERRIDES, a further arm")
    parser.add_argument("--rates", help="a grid for every cell")
    parser.add_argument("--calibration", type=int, default=2048, help="positions")
    parser.add_argument("--held-out", type=int, default=4000, help="positions measured at the end")
    parser.add_argument("--tables", action="store_true", help="measure nothing, only write")
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    return parser.parse_args()


def arms_of(told: argparse.Namespace) -> dict[str, str]:
    """The losses by name, as changes to a recipe."""
    arms = {name: ARMS[name] for name in told.arms.split(",") if name}
    return arms | dict(each.split("=", 1) for each in told.arm)


def shapes_of(told: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Shapes with every arm, and shapes with the main one only."""
    whole = [shape for shape in told.shapes.split(",") if shape]
    return whole, [shape for shape in told.choices.split(",") if shape and shape not in whole]


def cells(told: argparse.Namespace, arms: Sequence[str]) -> Iterator[Cell]:
    """Every cell, so ordered that whatever is missing is what would be missed least.

    Shapes before training come first, then the most used losses, the choices
    of layers, the other losses, and last the seeds beyond the first.
    """
    whole, choices = shapes_of(told)
    first = [arm for arm in CORE if arm in arms]
    others = [arm for arm in arms if arm not in first]
    yield from (Cell(shape, BEFORE, 0) for shape in (*whole, *choices))
    yield from (Cell(shape, arm, 0) for arm in first for shape in whole)
    yield from (Cell(shape, MAIN, 0) for shape in choices if MAIN in arms)
    yield from (Cell(shape, arm, 0) for arm in others for shape in whole)
    seeded = [shape for shape in told.seeded.split(",") if shape in whole]
    for seed in range(1, told.seeds):
        yield from (Cell(shape, arm, seed) for arm in (*first, *others) for shape in seeded)


def settings_of(told: argparse.Namespace) -> list[Any]:
    """What a cell's figures depend on besides the cell."""
    return [told.tokens, told.rates, told.held_out, told.calibration]
