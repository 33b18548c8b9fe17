"""Frozen models whose blocks keep their weights in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from limbeck.errors import ConfigError
from limbeck.models.causal_lm import CausalLM
from limbeck.models.prove import prove_documents_apart, prove_head

Bits = Literal["8bit", "4bit"]

DEVICES = ("cpu", "cuda")
"""Types of devices on which bitsandbytes computes."""


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
    library = require_bitsandbytes()
    if device.type not in DEVICES:
        raise ConfigError(
            f"teacher.quantize: bitsandbytes computes on {' and '.join(DEVICES)}, and the device "
            f"is {device.type}. Leave quantize out, or set device."
        )
    blocks = model.blocks
    linear = {name: m for name, m in blocks.named_modules() if type(m) is nn.Linear}
    if not linear:
        raise ConfigError(
            f"teacher.quantize: the blocks of a {model.family} model have no linear layers that "
            "can be quantised. Leave quantize out."
        )
    for name, layer in linear.items():
        parent, _, last = name.rpartition(".")
        made = layer_of(library, layer, bits)
        setattr(blocks.get_submodule(parent), last, made.to(device).eval())
    model.to(device).eval()
    prove_head(model)
    prove_documents_apart(model)
    return model


def layer_of(library: Any, layer: nn.Linear, bits: Bits) -> nn.Module:
    """A layer that is quantised when it is moved to its device."""
    size, weight = (layer.in_features, layer.out_features), layer.weight.data
    has_bias = layer.bias is not None
    made: Any
    if bits == "4bit":
        made = library.nn.Linear4bit(
            *size, bias=has_bias, quant_type="nf4", compute_dtype=weight.dtype, device="meta"
        )
        made.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        # Its CPU format rounds scales to bfloat16 and refuses sizes that are no multiples of 64.
        made.support_avx512bf16_for_cpu = False
    else:
        # A threshold would choose columns by all rows of a batch, which must not affect each other.
        made = library.nn.Linear8bitLt(
            *size, bias=has_bias, has_fp16_weights=False, threshold=0.0, device="meta"
        )
        made.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    whole: nn.Module = made
    return whole


def require_bitsandbytes() -> ModuleType:
    """The library that quantises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that it imports
            import bitsandbytes  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError as error:
        raise ConfigError(
            "teacher.quantize needs bitsandbytes, which is not installed here: pip install "
            "'limbeck[quantized]'."
        ) from error
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: ModuleType = bitsandbytes
    return found
