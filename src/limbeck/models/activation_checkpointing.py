"""Which activations of a block are kept for the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from limbeck.config.recipe import ActivationCheckpointing
from limbeck.errors import ConfigError
from limbeck.models.causal_lm import CausalLM

EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
]
"""Operations whose results `selective` keeps: products with weights, and fused attention."""


def checkpoint_activations(model: CausalLM, how: ActivationCheckpointing) -> None:
    """Let the blocks compute activations again in the backward pass instead of keeping them.

    Args:
        model: Its blocks are changed.
        how: `full` keeps a block's input only (Chen et al., 2016, arXiv:1604.06174). `selective`
            also keeps the results of `EXPENSIVE` operations. `none` keeps everything.

    Raises:
        ConfigError: The blocks of this family do not support it.
    """
    if how == "none":
        return
    again = functools.partial(checkpoint, use_reentrant=False)
    if how == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, EXPENSIVE)
        again = functools.partial(again, context_fn=contexts)
    for block in model.blocks:
        if not isinstance(block, GradientCheckpointingLayer):
            raise ConfigError(
                "memory.activation_checkpointing needs a family whose blocks support it; those of "
                f"{model.family} ({type(block).__name__}) do not. Set it to none."
            )
        layer: Any = block  # nn.Module types every attribute as a tensor or a module
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = again


def kept_values(block: nn.Module, width: int, how: ActivationCheckpointing) -> int:
    """Estimate of the values a token that a block keeps from its forward pass.

    Without checkpointing each linear layer keeps its input, and its output is kept by what follows;
    norms, rotations and attention keep about four more hidden states. `selective` keeps the block's
    input and the results of linear layers and attention, `full` the input alone. Attention scores
    are not kept by the kernels in use.
    """
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    results = sum(m.out_features for m in linear)
    match how:
        case "full":
            return width
        case "selective":
            return 2 * width + results
        case _:
            return 4 * width + results + sum(m.in_features for m in linear)
