"""Families in llama.cpp's terms: architecture, settings, and the layout of their weights.

Part of a family's computation is fixed in llama.cpp's code. A student whose configuration differs
from that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from gguf import MODEL_ARCH as ARCH
from gguf import GGUFWriter, RopeScalingType, get_tensor_name_map
from jaxtyping import Float
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.models import CausalLM, PreTrainedConfig, plain_weights
from limbeck.models.causal_lm import option

GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""llama.cpp computes all of these by the tanh formula."""
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Family:
    """A family's name and settings in llama.cpp.

    Attributes:
        activations: Activation functions that llama.cpp's is equal to.
        rotates_neighbours: Whether it rotates neighbouring channels (2i, 2i + 1) where transformers
            rotates halves (i, i + D/2), so that rows of queries and keys are reordered.
        norm_offset: Added to norm weights (Gemma multiplies by 1 + w).
        transposed: Ends of the names of matrices stored transposed (GPT-2).
        period: Every so-many-th layer attends to everything (`sliding_window`) or has no rotary
            embedding (SmolLM3); llama.cpp has the number in its code. 0 without such layers.
        fixed: Settings that llama.cpp has in its code.
    """

    arch: ARCH
    activations: tuple[str, ...] = ("silu",)
    rotates_neighbours: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    period: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(ARCH.LLAMA, rotates_neighbours=True),
    "mistral": Family(ARCH.LLAMA, rotates_neighbours=True),
    "qwen2": Family(ARCH.QWEN2, fixed={"use_sliding_window": False}),
    "qwen3": Family(ARCH.QWEN3, fixed={"use_sliding_window": False}),
    "gemma2": Family(ARCH.GEMMA2, activations=GELU, norm_offset=1.0, period=2),
    "gemma3_text": Family(
        ARCH.GEMMA3,
        activations=GELU,
        norm_offset=1.0,
        period=6,
        fixed={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "smollm3": Family(
        ARCH.SMOLLM3, rotates_neighbours=True, period=4, fixed={"use_sliding_window": False}
    ),
    "granite": Family(ARCH.GRANITE, rotates_neighbours=True),
    "cohere": Family(ARCH.COMMAND_R, fixed={"use_qk_norm": False}),
    "cohere2": Family(ARCH.COHERE2, period=4),
    "phi": Family(ARCH.PHI2, activations=GELU, fixed={"qk_layernorm": False}),
    "gpt2": Family(
        ARCH.GPT2,
        activations=GELU,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": Family(ARCH.GPTNEOX, activations=GELU),
}
"""By `config.model_type`: the families that limbeck prunes."""

FLOATS: Mapping[str, Callable[[GGUFWriter, float], None]] = {
    "attn_logit_softcapping": GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": GGUFWriter.add_final_logit_softcapping,
    "attention_multiplier": GGUFWriter.add_attention_scale,
    "embedding_multiplier": GGUFWriter.add_embedding_scale,
    "residual_multiplier": GGUFWriter.add_residual_scale,
    "logits_scaling": GGUFWriter.add_logit_scale,
    "logit_scale": GGUFWriter.add_logit_scale,
}
"""Settings of some families, and the writer's method for each."""


def family_of(student: CausalLM) -> Family:
    """A student's family, if llama.cpp computes what its configuration says."""
    config, family = student.config, FAMILIES.get(student.family)
    if family is None:
        raise ConfigError(
            f"A GGUF export needs a family whose layout is known ({', '.join(sorted(FAMILIES))}), "
            f"got {student.family}. Use llama.cpp's own converter."
        )
    for name, value in family.fixed.items():
        found = option(config, name)
        if found is not None and found != value:
            raise unlike(config, f"{name} = {value}", found)
    activation = option(config, "hidden_activation") or option(config, "hidden_act")
    activation = activation or option(config, "activation_function")
    if activation not in family.activations:
        raise unlike(config, f"the activation {' or '.join(family.activations)}", activation)
    scalar = option(config, "query_pre_attn_scalar")
    if scalar is not None and scalar != head_width(config):
        raise unlike(config, f"query_pre_attn_scalar = head_dim ({head_width(config)})", scalar)
    require_layer_pattern(config, family)
    return family


def unlike(config: PreTrainedConfig, computed: str, found: object) -> ConfigError:
    """The error for a student that llama.cpp would compute differently."""
    return ConfigError(
        f"llama.cpp computes a {config.model_type} model with {computed}, and this student has "
        f"{found}. It cannot be exported to GGUF."
    )


def require_layer_pattern(config: PreTrainedConfig, family: Family) -> None:
    """Refuse layers whose kind is not the one llama.cpp gives to their place.

    A student that lost layers keeps the kinds of those it kept, and its pattern is broken.
    """
    layers = range(int(config.num_hidden_layers))
    if family.arch == ARCH.SMOLLM3:
        kinds = [FULL if not rotary else SLIDING for rotary in option(config, "no_rope_layers")]
    else:
        kinds = option(config, "layer_types") or []
    expected = [FULL if family.period and (i + 1) % family.period == 0 else SLIDING for i in layers]
    if not family.period:
        expected = [FULL] * len(kinds)
    for layer, (kind, wanted) in enumerate(zip(kinds, expected, strict=False)):
        if kind != wanted:
            what = "attends to all positions" if wanted == FULL else "has a sliding window"
            if family.arch == ARCH.SMOLLM3:
                what = f"has {'no' if wanted == FULL else 'a'} rotary embedding"
            raise ConfigError(
                f"In llama.cpp layer {layer} of a {config.model_type} model {what}, and in this "
                "student it does not: layers were removed out of step with the family's period of "
                f"{family.period}. Remove whole periods of {family.period} layers, or prune widths."
            )


def head_width(config: PreTrainedConfig) -> int:
    """Channels of an attention head."""
    width = option(config, "head_dim")
    return int(width or int(config.hidden_size) // int(config.num_attention_heads))


def context_length(config: PreTrainedConfig, family: Family) -> tuple[int, tuple[str, ...]]:
    """Positions the file may claim, and a note where they are fewer than the student's."""
    whole = int(option(config, "max_position_embeddings"))
    window = option(config, "sliding_window")
    if family.arch != ARCH.LLAMA or window is None or window >= whole:
        return whole, ()
    note = (
        f"llama.cpp has no sliding window for {config.model_type}: the file claims {window:,} "
        f"positions, the window, within which both are equal, instead of {whole:,}."
    )
    return int(window), (note,)


def write_settings(writer: GGUFWriter, student: CausalLM, family: Family) -> None:
    """The architecture's settings."""
    config, width = student.config, head_width(student.config)
    inner = option(config, "intermediate_size") or option(config, "n_inner")
    heads = int(config.num_attention_heads)
    writer.add_block_count(student.num_layers)
    writer.add_context_length(context_length(config, family)[0])
    writer.add_embedding_length(student.width)
    writer.add_feed_forward_length(int(inner or 4 * student.width))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(option(config, "num_key_value_heads") or heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(student.vocabulary_size)
    rms = option(config, "rms_norm_eps")
    if rms is not None:
        writer.add_layer_norm_rms_eps(rms)
    else:
        writer.add_layer_norm_eps(
            option(config, "layer_norm_eps") or option(config, "layer_norm_epsilon")
        )
    if family.period and option(config, "sliding_window"):
        writer.add_sliding_window(int(option(config, "sliding_window")))
    if (parallel := option(config, "use_parallel_residual")) is not None:
        writer.add_parallel_residual(bool(parallel))
    for name, add in FLOATS.items():
        if (value := option(config, name)) is not None:
            add(writer, float(value))
    write_rope(writer, config, width)


def write_rope(writer: GGUFWriter, config: PreTrainedConfig, width: int) -> None:
    """Rotary embedding: base, rotated channels, scaling."""
    whole = option(config, "rope_parameters")
    if whole is None:
        return
    local, rope = whole.get(SLIDING), whole.get(FULL, whole)
    for each in (local, rope):
        kind = (each or {}).get("rope_type", "default")
        if kind not in ("default", "linear", "llama3") or (each is local and kind == "linear"):
            raise ConfigError(
                "A GGUF export writes the RoPE scalings default, linear and llama3, and this "
                f"{config.model_type} student has {kind}. Use llama.cpp's own converter."
            )
    if local is not None:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def tensors(student: CausalLM, family: Family) -> Iterator[tuple[str, str, Tensor]]:
    """Each tensor after its name in the student and in the file; float32, adapters merged."""
    names = get_tensor_name_map(family.arch, student.num_layers)
    size, rows = student.vocabulary_size, student.vocabulary_rows
    for own, value in plain_weights(student).items():
        if own.startswith(student.head_name) and student.is_tied:
            continue
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(
                f"Every tensor of a student must have a name in llama.cpp's {family.arch.name}, "
                f"and {own} has none. Use llama.cpp's own converter."
            )
        tensor = arranged(own, value.detach().float().cpu(), student.config, family)
        in_vocabulary = name.startswith(("token_embd.", "output.")) and len(tensor) == rows
        yield own, name, tensor[:size] if in_vocabulary else tensor
    factors = llama3_factors(student.config)
    if factors is not None:
        yield "", "rope_freqs.weight", factors


def arranged(own: str, tensor: Tensor, config: PreTrainedConfig, family: Family) -> Tensor:
    """A tensor in llama.cpp's layout."""
    heads = int(config.num_attention_heads)
    if family.norm_offset and own.endswith("norm.weight"):
        return tensor + family.norm_offset
    if own.endswith(family.transposed) and family.transposed:
        return tensor.T
    if family.rotates_neighbours and ".q_proj." in own:
        return with_neighbours(tensor, heads)
    if family.rotates_neighbours and ".k_proj." in own:
        return with_neighbours(tensor, int(option(config, "num_key_value_heads") or heads))
    if family.arch == ARCH.GPTNEOX and ".query_key_value." in own:  # [heads, 3] to [3, heads]
        split = tensor.view(heads, 3, head_width(config), *tensor.shape[1:])
        return split.transpose(0, 1).reshape(tensor.shape)
    return tensor


def with_neighbours(rows: Float[Tensor, "R ..."], heads: int) -> Float[Tensor, "R ..."]:
    """Rows of each head reordered so that the two of a rotated pair are neighbours.

    Example:
        >>> with_neighbours(torch.arange(8.0), 2).tolist()
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    pairs = rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def llama3_factors(config: PreTrainedConfig) -> Float[Tensor, " half"] | None:
    """What Llama 3 divides each rotary frequency by; None without its scaling."""
    rope = option(config, "rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = head_width(config)
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2).double() / width)
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is, 0: divided by the factor
    return (1 / ((1 - share) / float(rope["factor"]) + share)).float()
