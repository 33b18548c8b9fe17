"""Which weights of a student are trained, and which are frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from limbeck.config.trainable import PARTS, TrainableConfig, layers_named
from limbeck.errors import ConfigError
from limbeck.models.causal_lm import CausalLM, output_layer
from limbeck.models.lora import add_adapters
from limbeck.models.rounding import round_in_forward


def make_trainable(model: CausalLM, config: TrainableConfig, seed: int) -> None:
    """Freeze the parts that a recipe names, and round weights where it asks for that."""
    if config.quantize is not None:
        round_in_forward(model, config.quantize)
    if config.lora is not None:
        add_adapters(model, config.lora, seed)
    elif config.freeze:
        freeze(model, config.freeze)


def freeze(model: CausalLM, parts: Sequence[str]) -> None:
    """Freeze some parts.

    Args:
        parts: Of `PARTS`, or `layers.3`, or `layers.0-3`.
    """
    there = parts_of(model)
    if model.is_tied and ("embeddings" in parts) != ("head" in parts):
        named = "head" if "head" in parts else "embeddings"
        raise ConfigError(
            f"trainable.freeze: embeddings and head of this {model.family} student are one weight "
            f"(tied), which cannot be frozen as {named} alone. Name both, or neither."
        )
    for place, part in enumerate(parts):
        for parameter in named_by(part, place, model, there):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"trainable.freeze: something must be left to train, and {', '.join(parts)} are the "
            "whole student. Name less."
        )


def named_by(
    part: str, place: int, model: CausalLM, there: Mapping[str, list[nn.Parameter]]
) -> list[nn.Parameter]:
    """The parameters of a part, by its name."""
    layers = layers_named(part)
    if layers is not None and layers and layers[-1] < model.num_layers:
        return [p for i in layers for p in model.blocks[i].parameters()]
    if part in there:
        return there[part]
    if part == "head":  # tied to the embedding, and `freeze` requires both to be named
        return []
    raise ConfigError(
        f"trainable.freeze[{place}]: must name a part of the {model.family} student, which has "
        f"{', '.join(there)} and layers.0-{model.num_layers - 1}, got {part!r}."
    )


def parts_of(model: CausalLM) -> dict[str, list[nn.Parameter]]:
    """Parameters of each part of the model; a shared weight belongs to its first part."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    seen: set[nn.Parameter] = set()
    head = output_layer(model.hf_model)
    for name, module in model.hf_model.named_modules():
        for parameter in module.parameters(recurse=False):
            part = "head" if module is head else part_of(name, module)
            if parameter not in seen and part is not None:
                found[part].append(parameter)
            seen.add(parameter)
    return {part: parameters for part, parameters in found.items() if parameters}


def part_of(name: str, module: nn.Module) -> str | None:
    """The part a module belongs to, by its class and name."""
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if not isinstance(module, nn.Linear | Conv1D):
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    return "feed_forward"


def trained_facts(model: CausalLM, config: TrainableConfig) -> dict[str, Any]:
    """How much of a student is trained, and what the rest is; JSON.

    Frozen weights are not in checkpoints. Their hash is among the facts, because a run resumes only
    with the same ones.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {"parameters": trained, "of": model.num_parameters}
    if config.lora is not None:
        facts["lora"] = asdict(config.lora) | {"layers": len(model.adapters)}
    if config.quantize is not None:
        facts["quantize"] = config.quantize
    if config.freeze:
        facts["frozen_parts"] = list(config.freeze)
    if trained < model.num_parameters:
        facts["frozen_sha256"] = frozen_hash(model)
    return facts


def frozen_hash(model: CausalLM) -> str:
    """sha256 over the weights that are not trained: names, shapes, formats and bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.hf_model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            digest.update(
                parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
    for name, layer in model.packed.items():
        digest.update(f"{name}\n".encode())
        digest.update(layer.weight().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
