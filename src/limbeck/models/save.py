"""Saves a student as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.models.adapters import merged, own_names
from limbeck.models.build import hollow
from limbeck.models.causal_lm import CausalLM
from limbeck.models.quiet import quiet
from limbeck.models.rounding import as_computed

MAX_SHARD = "5GB"
"""Largest file of weights; a larger student has several, and an index."""


def save_student(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face folder: weights, configurations, tokenizer, chat template.

    Rows of the head beyond the vocabulary cannot be cut from an ordinary model, so its generation
    configuration suppresses them. Adapters are merged into the weights they change, into float32
    copies of those that are kept in 8 or 4 bits. All is then written in float32: rounded to a
    narrower format, many of those changes would be none.

    Weights that are rounded in the forward pass are written rounded. With `dtype`, weights and
    configuration are written in that format.

    Args:
        weights: All weights by name, gathered, where the model's own are sharded; names may carry
            the prefixes of the modules the model was wrapped in.
    """
    state = model.hf_model.state_dict() if weights is None else own_names(weights)
    state = as_computed(model, state)
    hf_model = model.hf_model
    if model.adapters:
        whole = merged({**state, **unpacked(model)}, model.adapters)
        hf_model, state = plain(model, whole, torch.float32)
    elif dtype is not None:
        hf_model, state = plain(model, state, dtype)
    owned = {name for name, _ in hf_model.named_parameters()}
    absent = owned - state.keys()
    assert not absent, f"weights to be saved must be all of the model's, without {sorted(absent)}"
    # Gathered copies of tied weights no longer share memory, and would be written twice.
    tied = {name for name, _ in hf_model.named_parameters(remove_duplicate=False)} - owned
    settings = generation_settings(hf_model.generation_config)
    padded = range(model.vocabulary_size, model.vocabulary_rows)
    if padded:
        suppressed = sorted({*(settings.suppress_tokens or ()), *padded})
        settings.suppress_tokens = suppressed
    kept, name = hf_model.generation_config, hf_model.config.name_or_path
    hf_model.generation_config, hf_model.config.name_or_path = settings, ""
    try:
        with quiet():
            hf_model.save_pretrained(
                folder,
                state_dict={n: t for n, t in state.items() if n not in tied},
                max_shard_size=MAX_SHARD,
            )
    finally:
        hf_model.generation_config, hf_model.config.name_or_path = kept, name
    tokenizer.save_pretrained(folder)
    # safetensors makes files that only their owner can read; the others have the folder's mode.
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


def plain(
    model: CausalLM, state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model without weights, as one is without adapters, and the weights it should have."""
    # The settings of a generation are not the architecture's, and are written by themselves.
    made = hollow(model.config, dtype)
    made.generation_config = model.hf_model.generation_config
    return made, {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


@torch.no_grad()
def round_weights(model: CausalLM, dtype: torch.dtype) -> None:
    """Round weights to what a narrower format can hold; they stay in their own, sharded or not."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def plain_weights(model: CausalLM) -> dict[str, Tensor]:
    """A model's weights as it computes with them: rounded, or with adapters merged into them."""
    state = as_computed(model, model.hf_model.state_dict())
    return merged({**state, **unpacked(model)}, model.adapters)


def unpacked(model: CausalLM) -> dict[str, Tensor]:
    """The weights that are kept in 8 or 4 bits, in float32, as a state dict would name them."""
    return {f"{name}.weight": layer.weight() for name, layer in model.packed.items()}


def generation_settings(settings: GenerationConfig | None) -> GenerationConfig:
    """A copy of generation settings that transformers agrees to save.

    Some published models have settings that contradict each other (a temperature without
    sampling), and those must not stop a finished student from being written.
    """
    made = GenerationConfig.from_dict({} if settings is None else settings.to_dict())
    try:
        made.validate(strict=True)
    except ValueError:
        made.do_sample = True
    return made
