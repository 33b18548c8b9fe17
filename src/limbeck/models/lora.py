"""Adapters of low rank in a student, by peft."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.config.trainable import LowRankConfig
from limbeck.errors import ConfigError, extra_needed
from limbeck.models.adapters import DOWN, LENGTHS, UP, Adapter, own_names
from limbeck.models.causal_lm import CausalLM
from limbeck.registry import suggest

LINEAR = (nn.Linear, Conv1D)

PUBLISHED = {
    DOWN: ".lora_A.weight",
    UP: ".lora_B.weight",
    LENGTHS: ".lora_magnitude_vector",
}
"""How names of an adapter's tensors end in peft's files."""


def add_adapters(model: CausalLM, lora: LowRankConfig, seed: int) -> None:
    """Freeze a model's weights, and add adapters that are zero at first to linear layers.

    Args:
        seed: Of the A matrices; B is zero. Equal seeds give equal adapters.
    """
    peft = require_peft()
    names = target_names(model, lora.targets)
    refuse_impossible(model, names, lora)
    is_transposed = isinstance(model.hf_model.get_submodule(names[0]), Conv1D)
    settings = peft_settings(lora, names, transposed=is_transposed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # If GPT-2's head is adapted with its blocks, peft changes the setting and warns.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model.hf_model)
    model.adapters = {name: adapter_at(model.hf_model.get_submodule(name)) for name in names}
    for parameter in model.parameters():
        if parameter.requires_grad:  # narrower ones lose small updates
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    model.eval()


def peft_settings(
    lora: LowRankConfig, names: Sequence[str], *, transposed: bool, base: str | None = None
) -> Any:
    """The configuration of peft's library for adapters of these layers."""
    return require_peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(names),
        use_dora=lora.dora,
        fan_in_fan_out=transposed,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def save_adapters(
    model: CausalLM,
    lora: LowRankConfig,
    base: str,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's adapters, unmerged, as a folder that peft opens over the base model.

    Args:
        base: Folder or hub name of the model with the frozen weights.
        weights: As `save_student` takes them.
    """
    state = model.hf_model.state_dict() if weights is None else own_names(weights)
    tensors = {
        f"base_model.model.{name.removesuffix(end)}{PUBLISHED[end]}": tensor.contiguous()
        for name, tensor in state.items()
        for end in PUBLISHED
        if name.endswith(end)
    }
    names = list(model.adapters)
    transposed = model.adapters[names[0]].transposed
    folder.mkdir()
    peft_settings(lora, names, transposed=transposed, base=base).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((folder / "adapter_config.json").stat().st_mode)


def adapter_at(layer: Any) -> Adapter:
    """The adapter that peft added to a layer."""
    return Adapter(
        scaling=float(layer.scaling["default"]),
        transposed=bool(layer.fan_in_fan_out),
        has_lengths=bool(layer.use_dora["default"]),
    )


def require_peft() -> ModuleType:
    """The library that makes adapters."""
    with extra_needed("trainable.lora", "peft", "lora"):
        import peft  # noqa: PLC0415  (an extra, and slow to import)
    found: ModuleType = peft
    return found


def target_names(model: CausalLM, targets: Sequence[str]) -> list[str]:
    """Linear layers whose names end with a target; without targets, all those of the blocks."""
    linear = [n for n, m in model.hf_model.named_modules() if isinstance(m, LINEAR)]
    if not targets:
        return [name for name in linear if name.startswith(f"{model.blocks_name}.")]
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    for place, target in enumerate(targets):
        if not any(is_named(name, target) for name in linear):
            raise ConfigError(
                f"trainable.lora.targets[{place}]: must be the end of a linear module's name, and "
                f"no such module of the {model.family} student ends with "
                f"{target!r}{suggest(target, known)}. It has: {', '.join(known)}."
            )
    return [name for name in linear if any(is_named(name, target) for target in targets)]


def is_named(name: str, target: str) -> bool:
    """Whether a module's name ends with these parts.

    Example:
        >>> is_named("model.layers.0.self_attn.q_proj", "self_attn.q_proj")
        True
    """
    return name == target or name.endswith(f".{target}")


def refuse_impossible(model: CausalLM, names: Sequence[str], lora: LowRankConfig) -> None:
    """Refuse adapters that would be larger than what they change, or could not be merged."""
    for name in names:
        shape = tuple(model.hf_model.get_parameter(f"{name}.weight").shape)
        narrow = min(shape)
        if lora.rank > narrow:
            raise ConfigError(
                f"trainable.lora.rank: must be at most {narrow}, the narrower side of {name} "
                f"{shape}, got {lora.rank}. Lower it, or leave that layer out of "
                "lora.targets."
            )
    if model.head_name not in names:
        return
    if model.is_tied:
        raise ConfigError(
            f"trainable.lora.targets: {model.head_name} of this {model.family} student is its "
            "embedding too (tied), so a change of the one cannot be merged without changing the "
            f"other. Leave {model.head_name} out."
        )
    if lora.dropout > 0:
        raise ConfigError(
            f"trainable.lora.dropout: must be 0 where the head ({model.head_name}) is adapted, "
            f"because logits are computed from one weight, got {lora.dropout}. Set it to 0, or "
            f"leave {model.head_name} out of lora.targets."
        )
