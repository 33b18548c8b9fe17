"""Linear layers that compute with their weights rounded to a format of GGUF, and train them.

Quantisation-aware training: the forward pass uses the rounded weights, the gradient passes the
rounding unchanged (straight-through, Bengio et al., 2013, arXiv:1308.3432), and the weights
themselves stay in float32. The formats are llama.cpp's, bit for bit, so that the exported file
holds exactly the weights that were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.config.trainable import WeightFormat
from limbeck.errors import ConfigError
from limbeck.models.causal_lm import CausalLM

BLOCK = 32
"""Weights that share a scale; both formats have blocks of this size along a row."""

Blocks = Float[Tensor, "blocks 32"]


def q4_0(blocks: Blocks) -> Blocks:
    """4 bits: 16 steps of one scale, from -8 to 7; the weight of largest size is -8 steps."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    steps = (blocks * inverse(scale) + 8.5).trunc().clamp(max=15) - 8
    return steps * scale.half().float()


def q8_0(blocks: Blocks) -> Blocks:
    """8 bits: steps from -127 to 127, of which the weight of largest size is the last."""
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = blocks * inverse(scale)
    away_from_zero = (steps.abs() + 0.5).floor().copysign(steps)  # C's roundf; torch rounds to even
    return away_from_zero * scale.half().float()


FORMATS: Mapping[WeightFormat, Callable[[Blocks], Blocks]] = {"q4_0": q4_0, "q8_0": q8_0}


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def rounded(weight: Float[Tensor, "R D"], to: WeightFormat) -> Float[Tensor, "R D"]:
    """A weight as a file of this format holds it, in its own dtype; D is divisible by 32."""
    blocks = weight.float().reshape(-1, BLOCK)
    return FORMATS[to](blocks).view(weight.shape).to(weight.dtype)


class StraightThrough(torch.autograd.Function):
    """`rounded`, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, to: WeightFormat) -> Tensor:
        return rounded(weight, to)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class RoundedLinear(nn.Linear):
    """A linear layer with the weight and bias of another one, which rounds the weight.

    Attributes:
        to_format: Format of the rounded weight.
    """

    def __init__(self, layer: nn.Linear, to: WeightFormat) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias, self.to_format = layer.weight, layer.bias, to

    def forward(self, input: Tensor) -> Tensor:
        weight = StraightThrough.apply(self.weight, self.to_format)  # type: ignore[no-untyped-call]
        return nn.functional.linear(input, weight, self.bias)


def round_in_forward(model: CausalLM, to: WeightFormat) -> None:
    """Let the linear layers of a model's blocks round their weights in every forward pass.

    Names of parameters do not change. Embeddings, head and norms are not rounded.

    Raises:
        ConfigError: A layer cannot be rounded.
    """
    linear = {name: m for name, m in model.blocks.named_modules() if type(m) is nn.Linear}
    if not linear:
        raise ConfigError(
            f"trainable.quantize: the blocks of a {model.family} student have no linear layers "
            "that can be rounded. Leave quantize out."
        )
    for name, layer in linear.items():
        if layer.in_features % BLOCK:
            raise ConfigError(
                f"trainable.quantize: rows must be divisible by {BLOCK}, the weights that share a "
                f"scale, and those of {model.blocks_name}.{name} have {layer.in_features}. Leave "
                "quantize out, or choose a student of another width."
            )
    for name, layer in linear.items():
        model.put(name, RoundedLinear(layer, to))


def rounds_weights(model: CausalLM) -> bool:
    """Whether layers compute with rounded or quantised weights."""
    return bool(model.packed) or any(isinstance(m, RoundedLinear) for m in model.modules())


def as_computed(model: CausalLM, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's own names, those of rounded layers as they are computed with."""
    formats = {
        f"{name}.weight": module.to_format
        for name, module in model.hf_model.named_modules()
        if isinstance(module, RoundedLinear)
    }
    return {
        name: rounded(tensor, formats[name]) if name in formats else tensor
        for name, tensor in tensors.items()
    }
