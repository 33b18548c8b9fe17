"""The axes of each family's weights, for width pruning.

Unlisted families and weights are refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from limbeck.errors import ConfigError

Axes = tuple[str | None, ...]
"""What each dimension of a weight indexes; None is never pruned.

`width`: hidden channels; `inner`: feed-forward units; `heads`, `kv_heads`: attention heads times
their size; `fused`: queries, keys and values concatenated; `fused_heads`: the same per head.
"""


@dataclass(frozen=True)
class Roles:
    """Weights and modules of a family by what they compute.

    Attributes:
        axes: By the end of a weight's name.
        inner_out: In a block, the module that reads the feed-forward units.
        heads_out: In a block, the module that reads the heads' outputs.
        norms: In a block, the norms that read the hidden state.
        norm_offset: Constant that an RMS norm adds to its weight; None for a layer norm.
        scaled_embedding: The embedding is multiplied by the root of the width.
        free_heads: Heads times their size need not be the width.
    """

    axes: Mapping[str, Axes]
    inner_out: str
    heads_out: str
    norms: tuple[str, ...]
    norm_offset: float | None = 0.0
    scaled_embedding: bool = False
    free_heads: bool = True


def linear(name: str, out: str | None, into: str | None) -> dict[str, Axes]:
    """A linear layer's weight and bias."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def transposed(name: str, out: str | None, into: str | None) -> dict[str, Axes]:
    """A linear layer with a transposed weight (GPT-2's Conv1D)."""
    return {f"{name}.weight": (into, out), f"{name}.bias": (out,)}


def norms(*names: str) -> dict[str, Axes]:
    """Norms over the hidden channels."""
    both = {f"{name}.weight": ("width",) for name in names}
    return {**both, **{f"{name}.bias": ("width",) for name in names}}


def gated(*more: str, offset: float = 0.0, scaled: bool = False) -> Roles:
    """Llama-like families: separate projections, a gated feed-forward part, RMS norms."""
    before = "pre_feedforward_layernorm" if more else "post_attention_layernorm"
    return Roles(
        axes={
            "embed_tokens.weight": (None, "width"),
            **linear("lm_head", None, "width"),
            **linear("q_proj", "heads", "width"),
            **linear("k_proj", "kv_heads", "width"),
            **linear("v_proj", "kv_heads", "width"),
            **linear("o_proj", "width", "heads"),
            **linear("gate_proj", "inner", "width"),
            **linear("up_proj", "inner", "width"),
            **linear("down_proj", "width", "inner"),
            **norms("input_layernorm", "post_attention_layernorm", "model.norm", *more),
            "q_norm.weight": (None,),
            "k_norm.weight": (None,),
        },
        inner_out="mlp.down_proj",
        heads_out="self_attn.o_proj",
        norms=("input_layernorm", before),
        norm_offset=offset,
        scaled_embedding=scaled,
    )


LLAMA = gated()
GEMMA = gated("pre_feedforward_layernorm", "post_feedforward_layernorm", offset=1.0, scaled=True)

ROLES: Mapping[str, Roles] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "phi": Roles(
        axes={
            "embed_tokens.weight": (None, "width"),
            **linear("lm_head", None, "width"),
            **linear("q_proj", "heads", "width"),
            **linear("k_proj", "kv_heads", "width"),
            **linear("v_proj", "kv_heads", "width"),
            **linear("dense", "width", "heads"),
            **linear("fc1", "inner", "width"),
            **linear("fc2", "width", "inner"),
            **norms("input_layernorm", "final_layernorm"),
            **dict.fromkeys(("q_layernorm.weight", "q_layernorm.bias"), (None,)),
            **dict.fromkeys(("k_layernorm.weight", "k_layernorm.bias"), (None,)),
        },
        inner_out="mlp.fc2",
        heads_out="self_attn.dense",
        norms=("input_layernorm",),
        norm_offset=None,
    ),
    "gpt2": Roles(
        axes={
            "wte.weight": (None, "width"),
            "wpe.weight": (None, "width"),
            **linear("lm_head", None, "width"),
            **transposed("attn.c_attn", "fused", "width"),
            **transposed("attn.c_proj", "width", "heads"),
            **transposed("mlp.c_fc", "inner", "width"),
            **transposed("mlp.c_proj", "width", "inner"),
            **norms("ln_1", "ln_2", "ln_f"),
        },
        inner_out="mlp.c_proj",
        heads_out="attn.c_proj",
        norms=("ln_1", "ln_2"),
        norm_offset=None,
        free_heads=False,
    ),
    "gpt_neox": Roles(
        axes={
            "embed_in.weight": (None, "width"),
            **linear("lm_head", None, "width"),
            **linear("query_key_value", "fused_heads", "width"),
            **linear("attention.dense", "width", "heads"),
            **linear("dense_h_to_4h", "inner", "width"),
            **linear("dense_4h_to_h", "width", "inner"),
            **norms("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        },
        inner_out="mlp.dense_4h_to_h",
        heads_out="attention.dense",
        norms=("input_layernorm", "post_attention_layernorm"),
        norm_offset=None,
        free_heads=False,
    ),
}
"""By `config.model_type`."""


def roles_of(config: PreTrainedConfig) -> Roles:
    """A family's roles."""
    roles = ROLES.get(config.model_type)
    if roles is None:
        raise ConfigError(
            f"Only {', '.join(sorted(ROLES))} models can be pruned in width, got "
            f"{config.model_type}. Prune layers instead (type: "
            "depth), or add the family to limbeck.prune.roles."
        )
    return roles


def axes_of(roles: Roles, family: str, name: str) -> Axes:
    """The axes of a weight."""
    parts = name.split(".")
    for length in (2, 3):  # longer names resolve ambiguous short ones
        axes = roles.axes.get(".".join(parts[-length:]))
        if axes is not None:
            return axes
    raise ConfigError(
        f"Every weight's axes must be known to prune it, but {family} has {name}, which is not "
        "listed. Prune layers instead (type: depth), or add it to limbeck.prune.roles."
    )
