"""Number formats of a GGUF file's tensors: llama.cpp's rules for mixing them.

`llama_model_quantize` is not in the wheel's C API; its rules for dense models are these. The blocks
themselves are made by llama.cpp (`llama_cpp.quantized`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

Quantize = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]


class FormatMix(NamedTuple):
    """How a quantisation chooses formats.

    Attributes:
        base: Of most matrices.
        better: Of the values' and the feed-forward output's matrices in the layers that matter
            most (the first and last eighth, and every third between).
        fused: Of queries, keys and values in one matrix.
        file_type: The file's label.
    """

    base: Kind
    better: Kind
    fused: Kind
    file_type: LlamaFileType


def uniform(kind: Kind, file_type: LlamaFileType) -> FormatMix:
    """One format for every matrix."""
    return FormatMix(kind, kind, kind, file_type)


MIXTURES: Mapping[str, FormatMix] = {
    "f32": uniform(Kind.F32, LlamaFileType.ALL_F32),
    "f16": uniform(Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": uniform(Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": uniform(Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": uniform(Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": FormatMix(Kind.Q5_K, Kind.Q6_K, Kind.Q6_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": FormatMix(Kind.Q4_K, Kind.Q6_K, Kind.Q5_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": uniform(Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

FALLBACKS: Mapping[Kind, Kind] = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""What a matrix gets whose rows are not divisible by 256."""

PLAIN = (Kind.F32, Kind.F16, Kind.BF16)


class Choice(NamedTuple):
    """The format of a tensor.

    Attributes:
        instead_of: The one its rows are not divisible for; None where it has what it should.
    """

    kind: Kind
    instead_of: Kind | None = None


def choose(
    name: str, shape: tuple[int, ...], quantize: Quantize, num_layers: int, *, is_head: bool
) -> Choice:
    """The format of a tensor.

    Args:
        name: In the GGUF file.
        shape: As PyTorch has it: rows, then their length.
        is_head: Whether logits are computed with it, alone or as embedding too.
    """
    mixture = MIXTURES[quantize]
    if len(shape) == 1 or name == "position_embd.weight":
        return Choice(Kind.F32)
    if mixture.base in PLAIN:
        return Choice(mixture.base)
    wanted = mixture.base
    if is_head and wanted != Kind.Q8_0:
        wanted = Kind.Q8_0 if shape[-1] % GGML_QUANT_SIZES[Kind.Q6_K][0] else Kind.Q6_K
    elif ".attn_qkv." in name:
        wanted = mixture.fused
    elif (".attn_v." in name or ".ffn_down." in name) and uses_more_bits(name, num_layers):
        wanted = mixture.better
    return fitting(wanted, shape[-1])


def fitting(wanted: Kind, width: int) -> Choice:
    """A format that rows of this length can have.

    Example:
        >>> fitting(Kind.Q4_K, 576).kind.name, fitting(Kind.Q4_K, 768).kind.name
        ('Q5_0', 'Q4_K')
    """
    kind = wanted
    if width % GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACKS.get(kind, Kind.F16)
    if width % GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16
    return Choice(kind, None if kind == wanted else wanted)


def uses_more_bits(name: str, num_layers: int) -> bool:
    """Whether a layer's sensitive matrices get the better format."""
    match = re.match(r"blk\.(\d+)\.", name)
    assert match is not None, f"{name} must be a block's tensor"
    layer, eighth = int(match[1]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
