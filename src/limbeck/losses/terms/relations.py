"""Match how alike the tokens of a text are to each other, in any width."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.terms.base import PairShapes, terms
from limbeck.losses.terms.hidden_state import unit
from limbeck.losses.terms.layer_maps import LayerChoice
from limbeck.losses.terms.segments import PieceTerm


@terms.register("relations")
def relations(shapes: PairShapes, *, layer_map: LayerChoice = "surviving") -> PieceTerm:
    """Mean squared gap between the two models' cosines of a token with those of its piece.

    For scored token i: mean over the scored tokens j of its piece of
    (cos(s_i, s_j) - cos(t_i, t_j))^2, mean over the pairs of layers; from 0 to 4. It needs no
    projector, and neither a rotation nor a scale of either model's states changes it. Memory: n^2
    for a piece of n tokens.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv:1907.09682,
    over the tokens of a piece in place of the images of a batch.

    Args:
        shapes: Layers of the pair.
        layer_map: Which layers are compared.
    """
    return PieceTerm(gap, shapes, layer_map)


def gap(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n E"]) -> Float[Tensor, " n"]:
    """Each token's mean squared gap between cosines with all tokens of the piece."""
    own, target = unit(student), unit(teacher)
    return (own @ own.t() - target @ target.t()).square().mean(-1)
