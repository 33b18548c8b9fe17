"""Match how alike the tokens of a text are to each other, in any width."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.objective.hidden_state import unit
from limbeck.objective.layer_maps import LayerChoice, chosen_map
from limbeck.objective.pieces import piece_by_piece
from limbeck.objective.projectors import exactly
from limbeck.objective.terms import PairShapes, StateTerm, StudentView, terms
from limbeck.signals import SignalNeeds, TeacherSignal


@terms.register("relations")
class RelationsTerm(StateTerm):
    """Mean squared gap between the two models' cosines of a token with those of its piece.

    For scored token i: mean over the scored tokens j of its piece of
    (cos(s_i, s_j) - cos(t_i, t_j))^2, mean over the pairs of layers; from 0 to 4. It needs no
    projector, and neither a rotation nor a scale of either model's states changes it. Memory: n^2
    for a piece of n tokens.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv:1907.09682,
    over the tokens of a piece in place of the images of a batch.
    """

    def __init__(self, shapes: PairShapes, *, layer_map: LayerChoice = "surviving") -> None:
        """
        Args:
            shapes: Layers of the pair.
            layer_map: Which layers are compared.
        """
        super().__init__()
        self.layer_map = chosen_map(layer_map, shapes)
        self.needs = SignalNeeds(layers=frozenset(t for _, t in self.layer_map.pairs))
        self.student_layers = frozenset(s for s, _ in self.layer_map.pairs)

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        """Mean over the pairs of each token's gap."""
        each = [
            piece_by_piece(
                gap, student, exactly(student.layer_hidden[mine]), signal.layer_hidden[theirs]
            )
            for mine, theirs in self.layer_map.pairs
        ]
        return torch.stack(each).mean(0)


def gap(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n E"]) -> Float[Tensor, " n"]:
    """Each token's mean squared gap between cosines with all tokens of the piece."""
    own, target = unit(student), unit(teacher)
    return (own @ own.t() - target @ target.t()).square().mean(-1)
