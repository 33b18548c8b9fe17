"""Terms that compare the tokens of a segment with each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import PairShapes, StateTerm, StudentView
from limbeck.losses.terms.layer_maps import LayerChoice, chosen_map
from limbeck.losses.terms.projectors import upcast

SegmentLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps a segment's student and teacher states, `[n, D]` and `[n, E]`, to one number a token."""


def per_segment(
    loss: SegmentLoss, student: StudentView, own: Float[Tensor, "N D"], target: Float[Tensor, "N E"]
) -> Float[Tensor, " N"]:
    """A loss computed on each segment's scored tokens separately.

    The result does not depend on how documents are batched. A document cut over two rows is two
    segments.
    """
    assert student.segments is not None, "terms that compare tokens need StudentView.segments"
    sizes = torch.unique_consecutive(student.segments, return_counts=True)[1].tolist() or [0]
    parts = zip(
        torch.split(own, sizes), torch.split(target.detach().to(own.dtype), sizes), strict=True
    )
    return torch.cat([loss(student_part, teacher_part) for student_part, teacher_part in parts])


class SegmentTerm(StateTerm):
    """A loss on block outputs within each segment, mean over the pairs of layers; any widths."""

    def __init__(self, loss: SegmentLoss, shapes: PairShapes, layer_map: LayerChoice) -> None:
        """
        Args:
            loss: Of one segment; its arguments are at least float32.
        """
        super().__init__()
        self.loss = loss
        self.layer_map = chosen_map(layer_map, shapes)
        self.needs = SignalNeeds(layers=frozenset(t for _, t in self.layer_map.pairs))
        self.student_layers = frozenset(s for s, _ in self.layer_map.pairs)

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        """Mean over the pairs of each token's loss."""
        each = [
            per_segment(
                self.loss, student, upcast(student.layer_hidden[mine]), signal.layer_hidden[theirs]
            )
            for mine, theirs in self.layer_map.pairs
        ]
        return torch.stack(each).mean(0)
