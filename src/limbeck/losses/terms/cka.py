"""Match the Gram matrices of a segment's hidden states; any hidden sizes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.terms.base import PairShapes, terms
from limbeck.losses.terms.layer_maps import LayerChoice
from limbeck.losses.terms.segments import SegmentTerm


@terms.register("cka")
def cka(shapes: PairShapes, *, layer_map: LayerChoice = "surviving") -> SegmentTerm:
    """One minus the linear CKA of student and teacher states over each segment, from 0 to 1.

    Every scored token has the value of its segment. Mean over the pairs of layers. Segments of one
    or two tokens have the value 0. With few tokens CKA is high for any two models. Memory: n^2 for
    a segment of n tokens.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
    arXiv:1905.00414; used there to measure, not to train.

    Args:
        shapes: Layers and widths of the pair.
        layer_map: `surviving`, `uniform`, `last`, or 0-based pairs [student, teacher]; see
            docs/hidden-states.md.
    """
    return SegmentTerm(one_minus_cka, shapes, layer_map)


def one_minus_cka(
    student: Float[Tensor, "n D"], teacher: Float[Tensor, "n E"]
) -> Float[Tensor, " n"]:
    """One minus linear CKA, for each of the segment's tokens.

    CKA is the cosine of the two centred Gram matrices. One minus it is computed as half the squared
    distance of the normalised matrices: value and gradient are exactly 0 at equality.
    """
    if len(student) <= 2:
        return student.sum(-1) * 0  # keeps a graph for backward
    own, target = normalised_gram(student), normalised_gram(teacher)
    return (0.5 * (own - target).square().sum()).expand(len(student))


def normalised_gram(state: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    """The centred Gram matrix, of Frobenius norm 1."""
    centred = state - state.mean(0)
    gram = centred @ centred.t()
    return torch.nn.functional.normalize(gram.flatten(), dim=0).view_as(gram)
