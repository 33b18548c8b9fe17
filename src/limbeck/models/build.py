"""Models from a configuration, with the attention function limbeck needs."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from limbeck.models.attention import attention_of

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
RETURNED_BYTES = 1 << 20
LARGEST_THRESHOLD = 1 << 25
"""What glibc's own, growing threshold comes to once a tensor as large has been freed."""


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


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """A context in which freed blocks of `RETURNED_BYTES` go back to the system at once.

    By itself glibc keeps blocks of up to 32 MiB, and fills them later with blocks of any size: a
    rank then holds memory of layers that it only gathered.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
    mallopt(M_TRIM_THRESHOLD, RETURNED_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
