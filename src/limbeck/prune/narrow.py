"""Width pruning: removes hidden channels, heads and feed-forward units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from limbeck.errors import ConfigError
from limbeck.models.build import hollow
from limbeck.models.causal_lm import CausalLM, option
from limbeck.models.load import copied_model
from limbeck.prune.layouts import Widths, made_config, widths_of, with_widths
from limbeck.prune.roles import Axes, Roles, axes_of, roles_of

PerLayer = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Kept:
    """Kept channels, units and heads, 0-based and increasing.

    Attributes:
        width: Hidden channels, the same in every layer.
        heads: Query heads of each layer; the same number in each kept group.
    """

    width: tuple[int, ...]
    inner: PerLayer
    heads: PerLayer
    kv_heads: PerLayer


def narrow_config(config: PreTrainedConfig, widths: Widths) -> PreTrainedConfig:
    """The configuration of a model with other widths; the head size is unchanged."""
    roles = roles_of(config)
    if widths == widths_of(config):
        return made_config(config, config.to_dict())
    whole = widths.heads * widths.head_width
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
            f"With qk_layernorm hidden must be heads times {widths.head_width} in "
            f"{config.model_type}, got hidden {widths.width} and heads "
            f"{widths.heads}. Cut intermediate only."
        )
    size = widths.head_width if tree.get("head_dim") is not None or whole != widths.width else None
    return with_widths(config, widths, {} if size is None else {"head_dim": size})


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model with this configuration, tied ones counted once; allocates nothing."""
    return sum(p.numel() for p in hollow(config, torch.float32).parameters())


def narrowed(model: CausalLM, kept: Kept, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A new model with copies of the kept part of every weight.

    Root-mean-square norms divide by the root of the number of channels; their weights are scaled so
    that removing channels that are always 0 changes nothing.
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
    """The kept part of every weight, by name."""
    roles, old = roles_of(model.config), widths_of(model.config)
    factor = (old.width / len(kept.width)) ** 0.5
    tied = bool(option(model.config, "tie_word_embeddings"))
    for name, tensor in model.hf_model.state_dict().items():
        axes = axes_of(roles, model.family, name)
        layer = layer_of(name, model.blocks_name)
        for at, axis in enumerate(axes):
            if axis is not None:
                tensor = tensor.index_select(at, rows(axis, kept, old, layer).to(tensor.device))  # noqa: PLW2901
        yield name, tensor if factor == 1 else scaled(name, tensor, axes, roles, factor, tied)


def scaled(
    name: str, tensor: Tensor, axes: Axes, roles: Roles, factor: float, tied: bool
) -> Tensor:
    """A pruned weight, corrected where the model scales by the root of the number of channels."""
    if roles.scaled_embedding and ("embed" in name or (tied and "lm_head" in name)):
        return tensor * factor
    if axes != ("width",) or roles.norm_offset is None or name.endswith("bias"):
        return tensor
    if name.endswith("model.norm.weight") and roles.scaled_embedding and tied:
        return tensor  # the head is the scaled embedding, which already applies the factor
    return (tensor + roles.norm_offset) * factor - roles.norm_offset


def rows(axis: str, kept: Kept, old: Widths, layer: int | None) -> Tensor:
    """Kept indices of a dimension."""
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
    """Indices of the chosen heads, `size` each.

    Example:
        >>> spans([0, 2], 2).tolist()
        [0, 1, 4, 5]
    """
    return (torch.tensor(chosen)[:, None] * size + torch.arange(size)).flatten()


def layer_of(name: str, blocks_name: str) -> int | None:
    """Block index of a weight; None outside the blocks."""
    if not name.startswith(f"{blocks_name}."):
        return None
    return int(name.removeprefix(f"{blocks_name}.").partition(".")[0])
