"""Blocks compiled by `torch.compile`, in place."""

from __future__ import annotations

import functools
import inspect
import warnings
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from limbeck.config.recipe import ActivationCheckpointing
from limbeck.errors import ConfigError
from limbeck.models.attention import SEGMENTS, segment_attention
from limbeck.models.causal_lm import CausalLM

BACKEND = "inductor"

VERSIONS = 64
"""Most versions of a block's code; beyond them torch runs it uncompiled. Student and teacher of one
family share its code, each with and without gradients, for one row or more, of one document or
more, in a first length and in any."""


def compiles(
    setting: Literal["auto"] | bool,
    device: torch.device,
    checkpointing: ActivationCheckpointing,
    *,
    reads_projections: bool,
    rounds_weights: bool = False,
) -> bool:
    """Whether blocks are compiled; a compiler is tried before the first step.

    Args:
        setting: `memory.compile`. `auto` compiles on CUDA, where nothing speaks against it.
        reads_projections: Whether a term reads queries, keys or values inside a block.
        rounds_weights: Whether blocks compute with rounded or quantised weights.

    Raises:
        ConfigError: It is `true` and cannot be.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False
    reason = None
    if checkpointing == "selective":
        reason = (
            "compiled blocks choose themselves what they compute again, so it does not go with "
            "memory.activation_checkpointing: selective. Set that to none or full"
        )
    elif reads_projections:
        reason = (
            "a term reads queries, keys or values inside blocks, where compiled code has no "
            "place to read them. Leave that term out"
        )
    elif rounds_weights:
        reason = (
            "compiled code may leave out the rounding of weights that trainable.quantize and "
            "trainable.lora.quantize ask for. Leave those out"
        )
    elif problem := compiler_problem(device):
        reason = f"no code can be compiled for {device.type} here ({problem}). Install a compiler"
    if reason is not None and setting is True:
        raise ConfigError(f"memory.compile: true: {reason}, or set memory.compile to false.")
    return reason is None


@functools.cache
def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None if a small function could and was right."""
    x = torch.linspace(-1, 1, 64, device=device)
    try:
        found = compiled(tried)(x)
    except Exception as error:  # compilers fail in many ways; each of them is an answer here
        return " ".join(str(error).split())[:160]
    return None if torch.allclose(found, tried(x), atol=1e-5) else "its result was wrong"


def tried(x: Tensor) -> Tensor:
    """What is compiled to try the compiler."""
    return (x * 2).sin() + x.mean()


def compile_blocks(model: CausalLM) -> None:
    """Compile the forward function of each block; names of weights stay.

    Hooks on a block, those of FSDP2 among them, and activation checkpointing stay outside. A block
    with a key and value cache, as in generation, runs uncompiled: its shapes change at each token.
    Blocks of one kind share their code.
    """
    # torch looks at `.grad` of a block's input while it captures, and warns itself that it does.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")
    # It reads lengths of documents, and a fused kernel gains nothing from a compiler.
    AttentionInterface.register(SEGMENTS, torch.compiler.disable(segment_attention))
    torch._dynamo.config.recompile_limit = VERSIONS
    for block in model.blocks:
        if "forward" not in vars(block):
            vars(block)["forward"] = compiled_forward(block)


def compiled_forward(block: nn.Module) -> Any:
    """A block's forward function, compiled where it has no cache."""
    plain = block.forward
    # Without transformers' wrapper that checkpoints: inside it nothing would be compiled.
    fast = compiled(MethodType(inspect.unwrap(type(block).forward), block))

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            return plain(*args, **kwargs)
        borders = kwargs.get("attention_mask")
        if borders is not None and borders.dtype == torch.int32:
            torch._dynamo.maybe_mark_dynamic(borders, 3)  # any number of documents
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
            typed: Any = block  # nn.Module types every attribute as a tensor or a module
            if block.training:
                return typed._gradient_checkpointing_func(partial(fast, **kwargs), *args)
        return fast(*args, **kwargs)

    return forward


def compiled(function: Any) -> Any:
    """A function that is compiled when it is first called."""
    return torch.compile(function, backend=BACKEND)
