"""An output head, independent of the model it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.errors import ConfigError

Transform = Callable[[Tensor], Tensor]
"""Logit transform: applied to `hidden @ weight.T + bias`, element by element."""


class Head(NamedTuple):
    """An output head: logits are `transform(hidden @ weight.T + bias)`.

    Attributes:
        weight: The matrix, gathered if it was sharded, cut to the V tokens both models know.
        bias: Added to the product, if the family has one.
        transform: A soft-cap or a scale, element by element; None for the product itself, which is
            the fast path. It may not hold anything that is trained.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    transform: Transform | None = None

    def __call__(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of all N hidden states at once."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        product = nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        return product if self.transform is None else self.transform(product)

    def detach(self) -> Head:
        """The same head without a graph."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, self.transform)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.transform)

    def require_frozen_transform(self) -> None:
        """Refuse a transform with trained parameters: the fused head gives them no gradient.

        It is applied to zero rows, which costs nothing.
        """
        if self.transform is None:
            return
        with torch.enable_grad():
            probe = self.transform(self.weight.new_zeros(0, len(self.weight)))
        if probe.requires_grad:
            raise ConfigError(
                "A head's transform must hold nothing that is trained, and this one has parameters "
                "that require gradients, which the fused head would not compute. Freeze them, fold "
                "them into the hidden states, or use `DistillationLoss.from_logits`."
            )
