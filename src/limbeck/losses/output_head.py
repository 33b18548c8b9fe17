"""An output head, apart from the model it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


def identity(product: Tensor) -> Tensor:
    """The product itself: what a head without a soft-cap or scale does to it."""
    return product


class Head(NamedTuple):
    """An output head: hidden states to logits, `finish(hidden @ weight.T + bias)`.

    Attributes:
        weight: The matrix, gathered if it was sharded, cut to the V tokens both models know.
        bias: Added to the product, if the family has one.
        finish: What a family then does, element by element (a soft-cap, a scale).
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    finish: Callable[[Tensor], Tensor] = identity

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of some hidden states, all at once."""
        same = torch.promote_types(hidden.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(same)
        return self.finish(nn.functional.linear(hidden.to(same), self.weight.to(same), bias))
