"""Match the geometry of a whole text's hidden states, in any width."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.terms.base import PairShapes, terms
from limbeck.losses.terms.layer_maps import LayerChoice
from limbeck.losses.terms.segments import PieceTerm


@terms.register("cka")
def cka(shapes: PairShapes, *, layer_map: LayerChoice = "surviving") -> PieceTerm:
    """One minus the linear CKA of student and teacher states over each piece, from 0 to 1.

    Every scored token of a piece is given its piece's value, so a piece weighs as much as it has
    tokens. Mean over the pairs of layers. A piece of one or two tokens has no geometry to match:
    its value is 0. With few tokens CKA is high for any two models. Memory: n^2 for a piece of n
    tokens.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
    arXiv:1905.00414; used there to measure, not to train.

    Args:
        shapes: Layers of the pair.
        layer_map: Which layers are compared.
    """
    return PieceTerm(unlike, shapes, layer_map)


def unlike(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n E"]) -> Float[Tensor, " n"]:
    """One minus linear CKA, for each of the piece's tokens.

    CKA is the cosine of the two centred Gram matrices; one minus it is half the squared gap of
    their directions, which at equality is 0 exactly, and its gradient too.
    """
    if len(student) <= 2:
        return student.sum(-1) * 0  # a graph all the same
    own, target = direction(student), direction(teacher)
    return (0.5 * (own - target).square().sum()).expand(len(student))


def direction(state: Float[Tensor, "n D"]) -> Float[Tensor, "n n"]:
    """The centred Gram matrix, of Frobenius norm 1."""
    centred = state - state.mean(0)
    gram = centred @ centred.t()
    return torch.nn.functional.normalize(gram.flatten(), dim=0).view_as(gram)
