"""Configuration settings that depend on depth or width.

A family that is not listed is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from limbeck.errors import ConfigError
from limbeck.models.causal_lm import option
from limbeck.models.source import first_line, last_line, refuse_unknown_kinds

FAMILIES = (
    *("cohere", "cohere2", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama"),
    *("mistral", "phi", "qwen2", "qwen3", "smollm3"),
)
"""Values of `config.model_type`."""

PER_LAYER = ("layer_types", "no_rope_layers")
"""Settings that are lists with one entry a layer."""


@dataclass(frozen=True)
class Shape:
    """The size of a new model; None takes the template's value, or derives it from the others."""

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None


def require_known(config: PreTrainedConfig) -> None:
    """Refuse families whose settings are not known, and blocks that depend on their position."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"Only {', '.join(FAMILIES)} models can be pruned or resized, got "
            f"{config.model_type}. Use a pretrained student, or add the family "
            "to limbeck.prune.layouts."
        )
    if option(config, "scale_attn_by_inverse_layer_idx"):
        raise ConfigError(
            f"A block must compute the same at any position, but {config.model_type} has "
            "scale_attn_by_inverse_layer_idx = True. Use a pretrained student."
        )


def inner_name(config: PreTrainedConfig) -> str:
    """The setting with the width inside a block's feed-forward part."""
    return "n_inner" if config.model_type == "gpt2" else "intermediate_size"


def has_kv_heads(config: PreTrainedConfig) -> bool:
    """Whether keys and values may have fewer heads than queries."""
    return "num_key_value_heads" in config.to_dict()


@dataclass(frozen=True)
class Widths:
    """Sizes of a model across its layers.

    Attributes:
        inner: Feed-forward units.
        head_width: Size of a head; never changed.
    """

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int


def widths_of(config: PreTrainedConfig) -> Widths:
    """A model's sizes, from its configuration."""
    require_known(config)
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    return Widths(
        width=width,
        inner=int(option(config, inner_name(config)) or 4 * width),
        heads=heads,
        kv_heads=int(option(config, "num_key_value_heads") or heads),
        head_width=int(option(config, "head_dim") or width // heads),
    )


def cut_config(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The configuration of a model with only these layers, in this order."""
    require_known(config)
    tree = config.to_dict()
    total = int(config.num_hidden_layers)
    for name, value in tree.items():
        listed = isinstance(value, list) and len(value) == total and "layer" in name
        if listed and name not in PER_LAYER:
            raise ConfigError(
                f"Every setting that is a list over layers must be known, but {config.model_type} "
                f"has {name} = {value}. Use a pretrained student, or add the setting to "
                "limbeck.prune.layouts."
            )
    for name in PER_LAYER:
        if tree.get(name) is not None:
            tree[name] = [tree[name][i] for i in layers]
    tree[own_name(config, "num_hidden_layers")] = len(layers)
    return made_config(config, tree)


def resized_config(
    config: PreTrainedConfig, shape: Shape, vocabulary_rows: int
) -> PreTrainedConfig:
    """The configuration of a new model of the same family and another size.

    Args:
        shape: Its size. Without `heads` the head size is kept; without `kv_heads` and
            `intermediate` their ratios are, the latter rounded up to a multiple of 8.
    """
    tree, old = config.to_dict(), widths_of(config)
    width = shape.width or old.width
    heads = shape.heads or max(width // old.head_width, 1)
    if width % heads or (width // heads) % 2:
        raise ConfigError(
            f"width must be heads times an even number, got width {width} and heads {heads}. "
            f"Set heads, for example to {_heads_for(width)}."
        )
    kv_heads = shape.kv_heads or max(heads * old.kv_heads // old.heads, 1)
    if shape.kv_heads is None and heads % kv_heads:
        kv_heads = heads
    if heads % kv_heads:
        raise ConfigError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}.")
    if shape.kv_heads not in (None, heads) and not has_kv_heads(config):
        raise ConfigError(
            f"{config.model_type} models have as many kv_heads as heads ({heads}), got {kv_heads}. "
            "Leave kv_heads out."
        )
    inner = shape.intermediate or -(-(old.inner * width // old.width) // 8) * 8
    sizes = [n for n in ("head_dim", "query_pre_attn_scalar") if tree.get(n) is not None]
    more = {
        "num_hidden_layers": shape.layers or int(config.num_hidden_layers),
        "vocab_size": vocabulary_rows,
        **dict.fromkeys(sizes, width // heads),
        **dict.fromkeys(PER_LAYER),
    }
    return with_widths(config, Widths(width, inner, heads, kv_heads, width // heads), more)


def with_widths(
    config: PreTrainedConfig, widths: Widths, more: Mapping[str, Any]
) -> PreTrainedConfig:
    """The configuration with these widths and other settings; None leaves a setting out."""
    changed = {
        "hidden_size": widths.width,
        "num_attention_heads": widths.heads,
        inner_name(config): widths.inner,
        **({"num_key_value_heads": widths.kv_heads} if has_kv_heads(config) else {}),
        **more,
    }
    tree = config.to_dict() | {own_name(config, name): value for name, value in changed.items()}
    left_out = [name for name, value in changed.items() if value is None]
    return made_config(config, {k: v for k, v in tree.items() if k not in left_out})


def read_pattern(path: Path) -> PreTrainedConfig:
    """A configuration from a config.json or its folder."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} must be a model's config.json, or a folder that holds one: {first_line(error)}"
        ) from error
    refuse_unknown_kinds(str(path), config)
    return config


def own_name(config: PreTrainedConfig, name: str) -> str:
    """The family's own name of a setting."""
    return str(config.attribute_map.get(name, name))


def made_config(config: PreTrainedConfig, tree: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration of the same family with other settings."""
    plain = {key: value for key, value in tree.items() if key != "_name_or_path"}
    try:
        made: PreTrainedConfig = type(config).from_dict(plain)
    except (ValueError, StrictDataclassError) as error:
        shape = {key: plain.get(key) for key in ("hidden_size", "num_attention_heads")}
        raise ConfigError(
            f"{config.model_type} has no model of this shape, {shape}: "
            f"{last_line(error)} Choose other sizes."
        ) from error
    return made


def _heads_for(width: int) -> int:
    return max(
        (h for h in range(1, width + 1) if width % (2 * h) == 0 and width // h >= 32), default=1
    )
