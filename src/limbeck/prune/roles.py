"""What each weight of a family is indexed by, so that a model can be made narrower.

A family that is not here is refused, not guessed, and so is a weight that no entry names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from limbeck.errors import ConfigError

Axes = tuple[str | None, ...]
"""What each dimension of a weight counts; None what is never cut.

`width` hidden channels; `inner` feed-forward units; `heads` and `kv_heads` attention heads times
their size; `fused` queries, keys and values end to end; `fused_heads` the three of each head
together.
"""


@dataclass(frozen=True)
class Roles:
    """Where a family keeps what.

    Attributes:
        axes: By the end of a weight's name.
        inner_out: In a block, the module that reads the feed-forward units.
        heads_out: In a block, the module that reads the heads' outputs.
        norms: In a block, the norms that read the hidden state.
        norm_offset: What a root-mean-square norm adds to its weight; None for a layer norm.
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
    """The same of a layer that keeps its weight the other way round (GPT-2's Conv1D)."""
    return {f"{name}.weight": (into, out), f"{name}.bias": (out,)}


def norms(*names: str) -> dict[str, Axes]:
    """Norms over the hidden channels."""
    both = {f"{name}.weight": ("width",) for name in names}
    return {**both, **{f"{name}.bias": ("width",) for name in names}}


def gated(*more: str, offset: float = 0.0, scaled: bool = False) -> Roles:
    """Llama and its like: separate projections, a gated feed-forward part, RMS norms."""
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
    """A family's roles.

    Raises:
        ConfigError: There is no entry for it.
    """
    roles = ROLES.get(config.model_type)
    if roles is None:
        raise ConfigError(
            f"A model can be made narrower if it is one of {', '.join(sorted(ROLES))}; limbeck has "
            f"no entry for the weights of {config.model_type}. Take layers out instead (type: "
            "depth), or add the family to limbeck.prune.roles."
        )
    return roles


def axes_of(roles: Roles, family: str, name: str) -> Axes:
    """What the dimensions of a weight count.

    Raises:
        ConfigError: No entry names it.
    """
    parts = name.split(".")
    for length in (2, 3):  # the longer names tell apart what the shorter share
        found = roles.axes.get(".".join(parts[-length:]))
        if found is not None:
            return found
    raise ConfigError(
        f"Every weight's dimensions must be known to cut them, but {family} has {name}, which no "
        "entry names. Take layers out instead (type: depth), or add it to limbeck.prune.roles."
    )
