"""Linear maps from the student's hidden size to the teacher's, one per layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.losses.terms.base import PairShapes


class Projectors(nn.ModuleDict):
    """A linear map for each student layer; empty if both models have the same hidden size.

    Initialised orthogonal. They are trained, sharded and checkpointed with the student, and not
    exported.
    """

    def __init__(self, layers: Iterable[int], shapes: PairShapes) -> None:
        super().__init__()
        if shapes.student_width == shapes.teacher_width:
            return
        for layer in sorted(layers):
            linear = nn.Linear(shapes.student_width, shapes.teacher_width, bias=False)
            nn.init.orthogonal_(linear.weight)
            self[str(layer)] = linear

    def project(self, layer: int, state: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """A student layer's states in the teacher's hidden size, in at least float32."""
        if str(layer) in self:
            linear = self[str(layer)]
            assert isinstance(linear, nn.Linear)
            state = linear(state.to(linear.weight.dtype))
        return upcast(state)


def upcast(state: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return state.to(torch.promote_types(state.dtype, torch.float32))
