"""A model's weights without some hidden channels, heads and feed-forward units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from limbeck.errors import ConfigError
from limbeck.models.build import from_config
from limbeck.models.causal_lm import CausalLM, option
from limbeck.models.load import copied_model
from limbeck.prune.layouts import layout_of, made_config, own_name
from limbeck.prune.roles import Axes, Roles, axes_of, roles_of

PerLayer = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Kept:
    """What stays of a model's width, 0-based and increasing.

    Attributes:
        width: Hidden channels, the same in every layer.
        inner: Feed-forward units of each layer.
        heads: Query heads of each layer; as many of every kept group.
        kv_heads: Heads of keys and values of each layer.
    """

    width: tuple[int, ...]
    inner: PerLayer
    heads: PerLayer
    kv_heads: PerLayer


@dataclass(frozen=True)
class Widths:
    """Sizes of a model across its layers.

    Attributes:
        width: Hidden channels.
        inner: Feed-forward units.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_width: Size of a head; never changed.
    """

    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int


def widths_of(config: PreTrainedConfig) -> Widths:
    """A model's sizes, from its configuration."""
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    return Widths(
        width=width,
        inner=int(config.to_dict().get(layout_of(config).inner) or 4 * width),
        heads=heads,
        kv_heads=int(option(config, "num_key_value_heads") or heads),
        head_width=int(option(config, "head_dim") or width // heads),
    )


def narrow_config(config: PreTrainedConfig, widths: Widths) -> PreTrainedConfig:
    """The configuration of a model of other widths, its heads as large as they were.

    Raises:
        ConfigError: The family cannot say such a shape.
    """
    roles, layout, old = roles_of(config), layout_of(config), widths_of(config)
    if widths == old:
        return made_config(config, config.to_dict())
    whole = widths.heads * widths.head_width
    told = f"{config.model_type} with hidden {widths.width} and {widths.heads} heads"
    if not roles.free_heads and whole != widths.width:
        raise ConfigError(
            f"In {config.model_type} models hidden must be heads times the size of a head, "
            f"{widths.head_width}, got hidden {widths.width} and heads {widths.heads}. Set heads: "
            f"{widths.width // widths.head_width} and hidden: "
            f"{widths.width // widths.head_width * widths.head_width}, or cut intermediate only."
        )
    tree = config.to_dict()
    if tree.get("qk_layernorm") and whole != widths.width:
        raise ConfigError(
            f"{told}: with qk_layernorm hidden must be heads times {widths.head_width}. Cut "
            "intermediate only."
        )
    changed = {
        "hidden_size": widths.width,
        "num_attention_heads": widths.heads,
        layout.inner: widths.inner,
    }
    if layout.has_kv_heads:
        changed["num_key_value_heads"] = widths.kv_heads
    if tree.get("head_dim") is not None or whole != widths.width:
        changed["head_dim"] = widths.head_width
    tree.update({own_name(config, name): value for name, value in changed.items()})
    return made_config(config, tree)


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters a model of a configuration would have, tied ones counted once; none is made."""
    with torch.device("meta"):
        return sum(p.numel() for p in from_config(config, torch.float32).parameters())


def narrowed(model: CausalLM, kept: Kept, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model of its own with copies of what is kept of every weight.

    Root-mean-square norms divide by the root of the number of channels; their weights are scaled so
    that channels that are always 0 can be left out without changing anything.

    Raises:
        ConfigError: There is no entry for the family or a weight, or no such shape in it.
    """
    old = widths_of(model.config)
    widths = Widths(
        len(kept.width), len(kept.inner[0]), len(kept.heads[0]), len(kept.kv_heads[0]),
        old.head_width,
    )  # fmt: skip
    config = narrow_config(model.config, widths)
    made = copied_model(config, dict(cut_weights(model, kept)), device=device, dtype=dtype)
    made.end_like(model)
    made.vocabulary_size = model.vocabulary_size
    return made


def cut_weights(model: CausalLM, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """What is kept of every weight, under its name."""
    roles, old = roles_of(model.config), widths_of(model.config)
    factor = (old.width / len(kept.width)) ** 0.5
    tied = bool(option(model.config, "tie_word_embeddings"))
    for name, tensor in model.hf_model.state_dict().items():
        axes = axes_of(roles, model.family, name)
        layer = layer_of(name, model.blocks_name)
        for at, axis in enumerate(axes):
            if axis is not None:
                tensor = tensor.index_select(at, rows(axis, kept, old, layer).to(tensor.device))  # noqa: PLW2901
        yield name, tensor if factor == 1 else scaled(name, tensor, axes, roles, (factor, tied))


def scaled(name: str, tensor: Tensor, axes: Axes, roles: Roles, how: tuple[float, bool]) -> Tensor:
    """A cut weight, corrected for the number of channels where the model divides by its root."""
    factor, tied = how
    embedding = roles.scaled_embedding and "embed" in name
    head = roles.scaled_embedding and tied and "lm_head" in name
    if embedding or head:
        return tensor * factor
    if axes != ("width",) or roles.norm_offset is None or name.endswith("bias"):
        return tensor
    if name.endswith("model.norm.weight") and roles.scaled_embedding and tied:
        return tensor  # the head is the scaled embedding, which does what the norm would have to
    return (tensor + roles.norm_offset) * factor - roles.norm_offset


def rows(axis: str, kept: Kept, old: Widths, layer: int | None) -> Tensor:
    """Which entries of a dimension stay."""
    if axis == "width":
        return torch.tensor(kept.width)
    assert layer is not None, f"{axis} exists inside blocks only"
    if axis == "inner":
        return torch.tensor(kept.inner[layer])
    heads, size = kept.heads[layer], old.head_width
    if axis == "kv_heads":
        return spans(kept.kv_heads[layer], size)
    if axis == "fused_heads":
        return spans(heads, 3 * size)
    if axis == "fused":
        return torch.cat([spans(heads, size) + part * old.heads * size for part in range(3)])
    return spans(heads, size)


def spans(chosen: Sequence[int], size: int) -> Tensor:
    """Entries of the chosen heads, `size` each.

    Example:
        >>> spans([0, 2], 2).tolist()
        [0, 1, 4, 5]
    """
    return (torch.tensor(chosen)[:, None] * size + torch.arange(size)).flatten()


def layer_of(name: str, blocks_name: str) -> int | None:
    """The block a weight is in; None outside of blocks."""
    if not name.startswith(f"{blocks_name}."):
        return None
    return int(name.removeprefix(f"{blocks_name}.").partition(".")[0])
