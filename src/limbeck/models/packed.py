"""Frozen linear layers whose weights are kept in 8 or 4 bits under a student's adapters."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class QuantizedLinear(nn.Module):
    """A frozen linear layer of bitsandbytes, which is neither a submodule nor in a state dict.

    FSDP2, optimizers and checkpoints therefore leave its weight alone: each rank has all of it.

    Attributes:
        numel: Numbers of its weight.
        nbytes: Bytes they take, with their scales.
    """

    def __init__(self, layer: Any, bias: nn.Parameter | None) -> None:
        """
        Args:
            layer: A `Linear4bit` or `Linear8bitLt` without bias, on its device.
        """
        super().__init__()
        self._hidden = (layer,)
        self.bias = bias
        self.numel = int(layer.in_features * layer.out_features)
        if layer.weight.dtype == torch.int8:
            layer.init_8bit_state()
            scales = layer.state.SCB
        else:
            scales = layer.weight.quant_state.absmax
        self.nbytes = int(layer.weight.data.nbytes + scales.nbytes)

    def forward(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape e"]:
        """The product with the packed weight."""
        made: Tensor = self._hidden[0](x)
        return made if self.bias is None else made + self.bias.to(made.dtype)

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "e d"]:
        """The weight that it computes with, in float32 on the CPU."""
        import bitsandbytes.functional as library  # noqa: PLC0415  (an extra)

        (layer,) = self._hidden
        if layer.weight.dtype == torch.int8:
            whole = library.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
        else:
            whole = library.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return cast(Tensor, whole).to("cpu", torch.float32)
