"""Models from a configuration, with the attention function limbeck needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from limbeck.heap import freed_memory_returned
from limbeck.models.attention import attention_of


def from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, on the CPU."""
    make: Any = AutoModelForCausalLM  # its methods carry no types
    model: PreTrainedModel = make.from_config(
        config, dtype=dtype, attn_implementation=attention_of(config)
    )
    return model


def empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the CPU whose weights are all still to be loaded.

    Drawing random weights only to replace them took 4.3 s of 4.4 s for SmolLM2-135M.
    """
    return tied_after(no_init_weights(), config, dtype)


def hollow(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters are on the meta device; its buffers are computed, on the CPU."""
    with freed_memory_returned():  # every parameter has memory before it goes to the meta device
        return tied_after(init_empty_weights(include_buffers=False), config, dtype)


def tied_after(
    context: AbstractContextManager[None], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """A model made inside a context; inside some, tying makes a second parameter."""
    with context:
        model = from_config(config, dtype)
    model.tie_weights()
    return model
