"""Low-rank adapters of linear layers: names of their tensors, and the merged weights.

Uses torch only: peft is needed to make adapters (`limbeck.models.lora`), not to read or merge them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

INSIDE = ".base_layer"
"""Where peft puts the layer that an adapter goes around."""

DOWN, UP, LENGTHS = (
    f".{part}.default.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector")
)
"""Ends of the names of A, B and DoRA's row lengths."""

WRAPPED = "hf_model."
"""What the wrappers put before a parameter's own name."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear layer.

    Attributes:
        scaling: Of B A.
        transposed: The layer stores its weight transposed (GPT-2's Conv1D).
        has_lengths: The norm of each row is trained separately (DoRA).
    """

    scaling: float
    transposed: bool
    has_lengths: bool

    def weight(self, name: str, tensors: Tensors) -> Tensor:
        """The weight this layer computes with, in at least float32; differentiable in A, B, m.

        W + scaling B A; with lengths, each of its rows is scaled to the norm m. The norm before
        scaling is a constant to the gradient.

        Source: Hu et al., 2021, arXiv:2106.09685, eq. 3; Liu et al., 2024, arXiv:2402.09353,
        eq. 5 and 11.

        Args:
            tensors: With the layer's own and its adapter's, under peft's names.
        """
        base = tensors[f"{name}{INSIDE}.weight"]
        exact = torch.promote_types(base.dtype, torch.float32)
        base = base.to(exact).t() if self.transposed else base.to(exact)
        change = tensors[name + UP].to(exact) @ tensors[name + DOWN].to(exact)
        whole = base + self.scaling * change
        if self.has_lengths:
            lengths = torch.linalg.norm(whole, dim=1).detach()
            whole = (tensors[name + LENGTHS].to(exact) / lengths)[:, None] * whole
        return whole.t() if self.transposed else whole


def merged(tensors: Tensors, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of a plain model that computes the same, under a plain model's names."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((DOWN, UP, LENGTHS)):
            continue
        layer, inside, rest = name.partition(INSIDE)
        if inside and rest == ".weight":
            plain[layer + rest] = adapters[layer].weight(layer, tensors).detach().contiguous()
        else:
            plain[layer + rest] = tensor
    return plain


def own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model inside the wrappers, under the model's own names."""
    return {
        name.partition(WRAPPED)[2]: tensor for name, tensor in weights.items() if WRAPPED in name
    } or dict(weights)
