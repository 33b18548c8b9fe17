"""Pairs of student and teacher layers that a term on hidden states compares."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.losses.terms.base import PairShapes

Layer = Annotated[int, Ge(0)]
LayerChoice = (
    Literal["surviving", "uniform", "last"] | Annotated[tuple[tuple[Layer, Layer], ...], MinLen(1)]
)
"""`surviving`: each layer of a pruned student with the teacher layer it was copied from, evenly
spread for other students. `uniform`: the student's layers evenly over the teacher's. `last`: the
last layer of both. Or a list of pairs (student, teacher)."""


def chosen_map(choice: LayerChoice, shapes: PairShapes) -> LayerMap:
    """The pairs a term compares; at least one."""
    last = shapes.student_layers - 1, shapes.teacher_layers - 1
    match choice:
        case "surviving":
            chosen = shapes.layer_map
        case "uniform":
            chosen = LayerMap.uniform(shapes.student_layers, shapes.teacher_layers)
        case "last":
            chosen = LayerMap((last,))
        case _:
            chosen = LayerMap(choice)
    if not chosen.pairs:
        raise ConfigError(
            f"layer_map: no layer of the student ({shapes.student_layers} layers) maps to one of "
            f"the teacher ({shapes.teacher_layers}): it was not pruned from it and has more "
            "layers. Use `last`, or list pairs [student, teacher]."
        )
    if absent := [pair for pair in chosen.pairs if pair[0] > last[0] or pair[1] > last[1]]:
        raise ConfigError(
            f"layer_map: pairs [student, teacher] go up to {list(last)}, the last layers, got "
            f"{[list(pair) for pair in absent]}. Count layers from 0."
        )
    return chosen
