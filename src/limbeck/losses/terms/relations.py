"""Match the cosine similarities between the tokens of a segment; any hidden sizes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.terms.base import PairShapes, terms
from limbeck.losses.terms.hidden_state import unit
from limbeck.losses.terms.layer_maps import LayerChoice
from limbeck.losses.terms.segments import SegmentTerm


@terms.register("relations")
def relations(shapes: PairShapes, *, layer_map: LayerChoice = "surviving") -> SegmentTerm:
    """Mean squared difference of the models' cosine similarities within each segment.

    For scored token i: mean over the scored tokens j of its segment of
    (cos(s_i, s_j) - cos(t_i, t_j))^2, mean over the pairs of layers; from 0 to 4. It needs no
    projector and is invariant to rotation and scale of either model's states. Memory: n^2 for a
    segment of n tokens.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv:1907.09682,
    applied to the tokens of a segment instead of the images of a batch.

    Args:
        shapes: Layers and widths of the pair.
        layer_map: `surviving`, `uniform`, `last`, or 0-based pairs [student, teacher]; see
            docs/hidden-states.md.
    """
    return SegmentTerm(gap, shapes, layer_map)


def gap(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n E"]) -> Float[Tensor, " n"]:
    """Each token's mean squared difference of its cosines with all tokens of the segment."""
    own, target = unit(student), unit(teacher)
    return (own @ own.t() - target @ target.t()).square().mean(-1)
