"""Which layers a term on hidden states pairs, from what a recipe says."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.losses.terms.base import PairShapes

Layer = Annotated[int, Ge(0)]
LayerChoice = (
    Literal["surviving", "origin", "uniform", "last"]
    | Annotated[tuple[tuple[Layer, Layer], ...], MinLen(1)]
)
"""`surviving`: as the student was made, so a pruned one is held to the very layers it kept, and one
that kept none is spread evenly; `origin` is its older name. `uniform` spreads the student's layers
evenly over the teacher's. `last` pairs only the last of both. Or pairs (student, teacher)."""


def chosen_map(choice: LayerChoice, shapes: PairShapes) -> LayerMap:
    """The pairs a term compares; at least one.

    Raises:
        ConfigError: There are none, or a layer is named that its model does not have.
    """
    last = shapes.student_layers - 1, shapes.teacher_layers - 1
    match choice:
        case "surviving" | "origin":
            chosen = shapes.layer_map
        case "uniform":
            chosen = LayerMap.uniform(shapes.student_layers, shapes.teacher_layers)
        case "last":
            chosen = LayerMap((last,))
        case _:
            chosen = LayerMap(choice)
    if not chosen.pairs:
        raise ConfigError(
            f"layer_map: a student of {shapes.student_layers} layers answers to none of its "
            f"teacher's {shapes.teacher_layers}: it was not cut out of it and cannot be spread "
            "over fewer. Use `last`, or list pairs [student, teacher]."
        )
    if absent := [pair for pair in chosen.pairs if pair[0] > last[0] or pair[1] > last[1]]:
        raise ConfigError(
            f"layer_map: pairs [student, teacher] go up to {list(last)}, the last layers, got "
            f"{[list(pair) for pair in absent]}. Count layers from 0."
        )
    return chosen
