"""Attention within the segments of packed rows, without a mask of T x T."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "limbeck_segments"
"""Name of this attention among transformers' attention functions."""

SOFTCAPPED = frozenset({"gemma2", "vaultgemma"})
"""Families that cap attention scores, which PyTorch's fused attention cannot."""

VARLEN_DTYPES = {"cuda": (torch.bfloat16, torch.float16)}
"""Number formats that a kind of device may have a varlen kernel for."""

PROBED = (3, 70, 20)
"""Lengths of the segments on which a device's varlen kernel is compared with the plain way."""

PROBE_TOLERANCE = 0.05
"""Largest difference there, of values of standard deviation 1 in bfloat16 or float16."""


def attention_of(config: PreTrainedConfig) -> str:
    """The attention function of a family, as transformers names it.

    Always set here: a model's own setting may name code on the hub.
    """
    return "eager" if config.model_type in SOFTCAPPED else SEGMENTS


def segment_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B G S d"],
    value: Float[Tensor, "B G S e"],
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B T H e"], None]:
    """Causal attention inside each segment of a row.

    Args:
        attention_mask: `Batch.segment_borders` as `[1, 1, 1, S + 1]`, which transformers hands on
            because it has four dimensions. Anything else is a mask, or None, as in generation.
            Without borders every row is one segment.
        sliding_window: Positions a token sees, itself included; None is all before it.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    borders, (rows, _, length, _) = attention_mask.flatten(), query.shape
    is_fast = dropout == 0 and has_varlen(query.device, query.dtype, query.shape[-1])
    if not len(borders):
        mask = window_mask(length, sliding_window, query.device)
        if mask is None or not is_fast:
            return sdpa_attention_forward(
                module, query, key, value, mask, dropout, scaling, **options
            )
        borders = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    attend = varlen if is_fast else one_by_one
    output = attend(q, k, v, borders, dropout, scaling, sliding_window)
    return output.view(rows, length, *output.shape[1:]), None


def varlen(
    query: Float[Tensor, "n H d"],
    key: Float[Tensor, "n G d"],
    value: Float[Tensor, "n G e"],
    borders: Int[Tensor, " S1"],
    _dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "n H e"]:
    """All segments in one FlashAttention kernel."""
    output = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        len(query),  # bounds on the longest segment, whose length is not known on the host
        len(query),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, Tensor), "without return_aux it is the output alone"
    return output


def one_by_one(
    query: Float[Tensor, "n H d"],
    key: Float[Tensor, "n G d"],
    value: Float[Tensor, "n G e"],
    borders: Int[Tensor, " S1"],
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "n H e"]:
    """A call of PyTorch's attention for each segment; on an accelerator it waits for `borders`."""
    sizes = borders.diff().tolist()
    outputs = []
    for each in zip(*(torch.split(tensor, sizes) for tensor in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in each)
        mask = window_mask(q.shape[2], sliding_window, q.device)
        output = scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def window_mask(
    length: int, sliding_window: int | None, device: torch.device
) -> Bool[Tensor, "1 1 T T"] | None:
    """The positions each position attends to; None if all before it."""
    if sliding_window is None or length <= sliding_window:
        return None
    seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - sliding_window)


@functools.cache
def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether a device has `varlen` for a number format and head size, equal to `one_by_one`.

    The first call may be inside a checkpointed block. `selective` must not see its operations,
    which are not there when the block is computed again.
    """
    if dtype not in VARLEN_DTYPES.get(device.type, ()):
        return False
    with _disable_current_modes():
        return varlen_is_right(device, dtype, head_size)


def varlen_is_right(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `varlen` runs there, and gives what `one_by_one` does."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(PROBED), heads, head_size) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    borders = torch.tensor([0, *PROBED], device=device).cumsum(0).to(torch.int32)
    try:
        fast = varlen(q, k, v, borders, 0.0, None, 16)
    except RuntimeError:  # no kernel for it
        return False
    plain = one_by_one(q, k, v, borders, 0.0, None, 16)
    return bool((fast - plain).abs().max() < PROBE_TOLERANCE)


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, sdpa_mask)
