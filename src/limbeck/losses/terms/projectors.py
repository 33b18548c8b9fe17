"""Linear maps from the student's width to the teacher's, one a layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.losses.terms.base import PairShapes


class Projectors(nn.ModuleDict):
    """A linear map for each student layer, and none where both models are equally wide.

    They begin orthogonal: as far as the widths allow, lengths and angles are what they were. They
    are trained, sharded and checkpointed with the student, and are no part of what is exported.
    """

    def __init__(self, layers: Iterable[int], shapes: PairShapes) -> None:
        """
        Args:
            layers: Of the student, 0-based.
            shapes: Has the widths.
        """
        super().__init__()
        if shapes.student_width == shapes.teacher_width:
            return
        for layer in sorted(layers):
            linear = nn.Linear(shapes.student_width, shapes.teacher_width, bias=False)
            nn.init.orthogonal_(linear.weight)
            self[str(layer)] = linear

    def project(self, layer: int, state: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """A student layer's states in the teacher's width, in at least float32."""
        if str(layer) in self:
            linear = self[str(layer)]
            assert isinstance(linear, nn.Linear)
            state = linear(state.to(linear.weight.dtype))
        return exactly(state)


def exactly(state: Tensor) -> Tensor:
    """The same numbers in at least float32."""
    return state.to(torch.promote_types(state.dtype, torch.float32))
