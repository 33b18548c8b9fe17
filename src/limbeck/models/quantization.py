"""Frozen weights of blocks in 8 or 4 bits, by bitsandbytes: a teacher's, or under adapters."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

from limbeck.config.trainable import Bits
from limbeck.errors import ConfigError, extra_needed
from limbeck.models.causal_lm import CausalLM
from limbeck.models.packed import QuantizedLinear
from limbeck.models.prove import prove_documents_apart, prove_head

DEVICES = ("cpu", "cuda")
"""Types of devices on which bitsandbytes computes."""

PACKED_OPTION = "trainable.lora.quantize"

ADAPTED = ".lora_"
"""In the names of the matrices of adapters."""


def quantized(model: CausalLM, bits: Bits, device: torch.device) -> CausalLM:
    """A model moved to its device with the linear layers of its blocks quantised, one by one.

    `8bit` rounds each row of a weight to int8, `4bit` each 64 numbers to NF4 (Dettmers et al.,
    2023, arXiv:2305.14314). Embeddings, norms and head stay as they are.

    Args:
        model: On the CPU; it is changed.
        device: Where it will compute.

    Raises:
        ConfigError: bitsandbytes is missing or cannot compute on the device, or the blocks have no
            linear layers.
    """
    library = require_bitsandbytes("teacher.quantize")
    for name, layer in linear_layers(model, "teacher.quantize", device).items():
        made = layer_of(library, layer, bits)
        made.bias = layer.bias
        model.put(name, made.to(device).eval())
    model.to(device).eval()
    prove_head(model)
    prove_documents_apart(model)
    return model


def pack(model: CausalLM, bits: Bits, device: torch.device, compute: torch.dtype) -> None:
    """Quantise the frozen linear layers of a student's blocks, in place (QLoRA).

    Source: Dettmers et al., 2023, arXiv:2305.14314.

    Args:
        model: With its adapters; weights that are trained stay as they are.
        device: Where it will compute.
        compute: Format of the products with 4-bit weights.

    Raises:
        ConfigError: As `quantized`.
    """
    library = require_bitsandbytes(PACKED_OPTION)
    for name, layer in linear_layers(model, PACKED_OPTION, device).items():
        made: Any = layer_of(library, layer, bits)
        made.compute_dtype = compute
        model.put(name, QuantizedLinear(made.to(device).eval(), layer.bias).eval())


def linear_layers(model: CausalLM, option: str, device: torch.device) -> dict[str, nn.Linear]:
    """The linear layers of a model's blocks, but for adapters, by their names in the blocks."""
    if device.type not in DEVICES:
        raise ConfigError(
            f"{option}: bitsandbytes computes on {' and '.join(DEVICES)}, and the device "
            f"is {device.type}. Leave quantize out, or set device."
        )
    modules = model.blocks.named_modules()
    linear = {n: m for n, m in modules if type(m) is nn.Linear and ADAPTED not in n}
    if not linear:
        raise ConfigError(
            f"{option}: the blocks of a {model.family} model have no linear layers that "
            "can be quantised. Leave quantize out."
        )
    return linear


def layer_of(library: Any, layer: nn.Linear, bits: Bits) -> nn.Module:
    """A layer without bias that is quantised when it is moved to its device."""
    size, weight = (layer.in_features, layer.out_features), layer.weight.data
    made: Any
    if bits == "4bit":
        made = library.nn.Linear4bit(
            *size, bias=False, quant_type="nf4", compute_dtype=weight.dtype, device="meta"
        )
        made.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        # Its CPU format rounds scales to bfloat16 and refuses sizes that are no multiples of 64.
        made.support_avx512bf16_for_cpu = False
    else:
        # A threshold would choose columns by all rows of a batch, which must not affect each other.
        made = library.nn.Linear8bitLt(
            *size, bias=False, has_fp16_weights=False, threshold=0.0, device="meta"
        )
        made.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    whole: nn.Module = made
    return whole


def require_bitsandbytes(option: str) -> ModuleType:
    """The library that quantises; an option of the recipe asks for it."""
    with extra_needed(option, "bitsandbytes", "quantized"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it imports
        import bitsandbytes  # noqa: PLC0415  (an extra, and slow to import)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: ModuleType = bitsandbytes
    return found
