"""Comparing tokens with each other, within a piece of text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import PairShapes, StateTerm, StudentView
from limbeck.losses.terms.layer_maps import LayerChoice, chosen_map
from limbeck.losses.terms.projectors import exactly

PieceLoss = Callable[[Tensor, Tensor], Tensor]
"""A piece's student and teacher states, `[n, D]` and `[n, E]`, to one number a token."""


def piece_by_piece(
    loss: PieceLoss, student: StudentView, own: Float[Tensor, "N D"], target: Float[Tensor, "N E"]
) -> Float[Tensor, " N"]:
    """A loss taken in each piece of text alone, over its scored tokens.

    What lies together in a batch then never matters, and a piece weighs as much as it has scored
    tokens. A document cut over two windows is two pieces, which are not compared.
    """
    assert student.pieces is not None, "a view for terms that compare tokens must say their pieces"
    sizes = torch.unique_consecutive(student.pieces, return_counts=True)[1].tolist() or [0]
    parts = zip(
        torch.split(own, sizes), torch.split(target.detach().to(own.dtype), sizes), strict=True
    )
    return torch.cat([loss(mine, theirs) for mine, theirs in parts])


class PieceTerm(StateTerm):
    """A loss on block outputs within each piece, mean over the pairs of layers; any two widths."""

    def __init__(self, loss: PieceLoss, shapes: PairShapes, layer_map: LayerChoice) -> None:
        """
        Args:
            loss: Of one piece; states come to it in at least float32.
            shapes: Layers of the pair.
            layer_map: Which layers are compared.
        """
        super().__init__()
        self.loss = loss
        self.layer_map = chosen_map(layer_map, shapes)
        self.needs = SignalNeeds(layers=frozenset(t for _, t in self.layer_map.pairs))
        self.student_layers = frozenset(s for s, _ in self.layer_map.pairs)

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        """Mean over the pairs of each token's loss."""
        each = [
            piece_by_piece(
                self.loss, student, exactly(student.layer_hidden[mine]), signal.layer_hidden[theirs]
            )
            for mine, theirs in self.layer_map.pairs
        ]
        return torch.stack(each).mean(0)
