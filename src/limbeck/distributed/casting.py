"""Weights cast to the format a model computes in, where no FSDP2 does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from limbeck.models import CausalLM

NARROW = (torch.bfloat16, torch.float16)


def cast_bytes(module: nn.Module) -> int:
    """Bytes of the weights that `cast_weights` casts, in the format they are cast to."""
    dtype = cast_to(module)
    if dtype is None:
        return 0
    weights = (weight for weight in module.parameters() if weight.is_floating_point())
    return sum(weight.numel() * dtype.itemsize for weight in weights)


def cast_to(module: nn.Module) -> torch.dtype | None:
    """The format that `cast_weights` casts a module's weights to; None where it does not."""
    models = [part for part in module.modules() if isinstance(part, CausalLM)]
    dtype = next((model.compute_dtype for model in models), None)
    return None if isinstance(module, FSDPModule) else dtype


def compute_in(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the format of a module that is not sharded; `cast_weights` applies it."""
    if dtype in NARROW:
        for part in module.modules():
            if isinstance(part, CausalLM):
                part.compute_dtype = dtype


@contextmanager
def cast_weights(module: nn.Module) -> Iterator[None]:
    """A context in which a module's weights are cast to the format it computes in.

    Gradients reach the weights themselves, in their own format, and add up there. Forward and
    backward pass must both run inside it: checkpointed blocks run again in the backward pass.
    Weights that are cast already stay as they are, and FSDP2 casts those of a sharded module.

    Args:
        module: What `shard` was called with.
    """
    dtype = cast_to(module)
    if dtype is None:
        yield
        return
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (part._parameters, name, weight)
        for part in module.modules()
        for name, weight in part._parameters.items()
        if isinstance(weight, nn.Parameter) and weight.is_floating_point()
    ]
    narrowed: dict[nn.Parameter, Tensor] = {}  # tied weights stay tied
    try:
        for weights, name, weight in places:
            if weight not in narrowed:
                narrowed[weight] = weight.to(dtype)
            weights[name] = narrowed[weight]
        yield
    finally:
        for weights, name, weight in places:
            weights[name] = weight
