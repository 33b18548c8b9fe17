"""Formats of ExecuTorch programs in few bits, by torchao.

In both, a layer's inputs have 8 bits and a scale for each token, computed at run time. `8da8w`:
weights have 8 bits and a scale for each row. `8da4w`: 4 bits and a scale for each group, but as in
`8da8w` in the head and where rows do not divide into groups. Embeddings, norms and biases stay in
float32.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

FewBits = Literal["8da8w", "8da4w"]


def quantise(model: PreTrainedModel, quantize: FewBits, group_size: int) -> dict[str, str]:
    """Quantise the layers of a model; weights that it shares with another are not changed.

    Args:
        group_size: Weights of a group in `8da4w`; XNNPACK requires a multiple of 32.

    Returns:
        What matrices have whose rows do not divide into groups.
    """
    library: Any = importlib.import_module("torchao.quantization")
    layers = linear_layers(model)
    head = model.get_output_embeddings()
    wanted = {n: layer for n, layer in layers.items() if layer is not head and quantize == "8da4w"}
    grouped = {name for name, layer in wanted.items() if layer.in_features % group_size == 0}
    four = library.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]  # missing in PyTorch's stubs
        weight_granularity=library.PerGroup(group_size),
        # The default clips the largest weight of a group; KL is 13 % higher with it (LOG.md).
        weight_mapping_type=library.MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    )
    eight = library.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=library.PerAxis(0)
    )
    library.quantize_(model, four, lambda _layer, name: name in grouped)
    library.quantize_(model, eight, lambda _layer, name: name in layers.keys() - grouped)
    return {f"{n}.weight": "8da8w instead of 8da4w" for n in wanted if n not in grouped}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers by name; GPT-2's, which store their matrix transposed, become ordinary ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Conv1D):
            matrix = layer.weight.T.contiguous()
            made = nn.Linear(matrix.shape[1], matrix.shape[0], device="meta")
            made.weight, made.bias = nn.Parameter(matrix), layer.bias
            model.set_submodule(name, made)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
