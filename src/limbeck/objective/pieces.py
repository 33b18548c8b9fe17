"""Comparing tokens with each other, within a piece of text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.objective.terms import StudentView

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
