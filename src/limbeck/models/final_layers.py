"""The last two layers of a model, its final norm and its head, without the rest of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.batch import sent
from limbeck.errors import ConfigError, DataError
from limbeck.losses import Head
from limbeck.models.build import hollow
from limbeck.models.causal_lm import decoder_of, find_blocks, output_layer
from limbeck.models.heads import transform_of
from limbeck.models.quiet import quiet
from limbeck.models.source import (
    MODALITIES,
    ModelLocation,
    ModelSource,
    damaged,
    find,
    first_line,
    open_config,
)
from limbeck.models.weight_files import NeedsWholeLoad, WeightFiles, find_named, tied_groups

FORMATS = ("F64", "F32", "F16", "BF16")
"""Of weights that are read, as safetensors names them."""


@dataclass(frozen=True)
class FinalLayers:
    """The final norm and the head of a model, on one device and in one data type.

    Attributes:
        norm: Hidden states after the last block to the head's input, row by row.
        head: The output head, padding included until `cut`.
    """

    norm: nn.Module
    head: Head

    @torch.no_grad()
    def last_hidden(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The head's input, in its data type and on its device, from the last block's output."""
        weight = self.head.weight
        hidden: Tensor = self.norm(sent(states, weight.device).to(weight.dtype))
        return hidden

    def cut(self, vocabulary_size: int) -> FinalLayers:
        """The same layers with the first rows of the head only; views, not copies."""
        weight, bias = self.head.weight[:vocabulary_size], self.head.bias
        bias = None if bias is None else bias[:vocabulary_size]
        return replace(self, head=self.head._replace(weight=weight, bias=bias))


def load_final_layers(
    source: ModelSource, *, device: torch.device, dtype: torch.dtype
) -> FinalLayers:
    """Read the final norm and the head of a model; of its other weights none is read.

    The model may be a mixture of experts, or have quantised blocks. On the hub only the files that
    hold these two layers are fetched.

    Raises:
        ConfigError: It is not there, or is of a family whose last layers are not known.
        DataError: These weights are absent, damaged or not finite.
        TryLaterError: The hub does not answer.
    """
    place = find(source)
    if place.name.endswith(".gguf"):
        raise ConfigError(
            f"The final norm and the head of {source.path} must be in safetensors, and it is a "
            ".gguf file. Give the folder of the model in transformers' format."
        )
    with quiet():
        hf_model = outline(source, place, dtype)
    norm_name = final_norm(hf_model)
    norm, layer = decoder_of(hf_model).get_submodule(norm_name), output_layer(hf_model)
    head_name = next(name for name, module in hf_model.named_modules() if module is layer)
    modules = {f"{hf_model.base_model_prefix}.{norm_name}": norm, head_name: layer}
    files = find_layers(source, place, hf_model, modules)
    for name, module in modules.items():
        read_layer(source, files, name, module.to_empty(device=device))
    bias = None if layer.bias is None else layer.bias.detach()
    head = Head(layer.weight.detach(), bias, transform_of(hf_model.config))
    return FinalLayers(norm.eval().requires_grad_(False), head)


def outline(source: ModelSource, place: ModelLocation, dtype: torch.dtype) -> PreTrainedModel:
    """A model without weights, of any kind of language model.

    Raises:
        ConfigError: It is of another kind, or transformers does not know it.
    """
    config = copy.deepcopy(open_config(source, place))
    plain: Mapping[str, Any] = config.to_dict()
    if modality := next((key for key in MODALITIES if plain.get(key)), None):
        raise ConfigError(
            f"A model must read text only for its final norm and head to be found, but "
            f"{source.path} ({config.model_type}) has a {modality}. Serve the text part alone."
        )
    try:
        return hollow(config, dtype)
    except (ValueError, KeyError, RuntimeError, ZeroDivisionError, ImportError) as error:
        raise ConfigError(
            f"No model can be made of the configuration of {source.path}: {first_line(error)}"
        ) from error


def final_norm(hf_model: PreTrainedModel) -> str:
    """The name of the decoder's final norm: the only norm beside its blocks, after them.

    Raises:
        ConfigError: There is none, or more than one.
    """
    children = list(decoder_of(hf_model).named_children())
    blocks = find_blocks(hf_model)
    names = [name for name, _ in children]
    after = children[names.index(blocks) + 1 :] if blocks in names else []
    norms = [name for name, module in after if type(module).__name__.endswith("Norm")]
    if len(norms) != 1:
        raise ConfigError(
            f"The decoder of {type(hf_model).__name__} ({hf_model.config.model_type}) must have "
            f"one norm after its blocks, and has {len(norms)} beside {blocks}. limbeck cannot "
            "read hidden states of this family: leave teacher.states out, or choose a Llama-like "
            "model."
        )
    return norms[0]


def find_layers(
    source: ModelSource,
    place: ModelLocation,
    hf_model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
) -> WeightFiles:
    """Where the weights of some layers are; of tied weights either name is enough.

    Raises:
        DataError: One is nowhere.
    """
    wanted = [
        f"{prefix}.{name}" for prefix, module in modules.items() for name in module.state_dict()
    ]
    groups = {name: names for names in tied_groups(hf_model) for name in names}
    try:
        found = find_named(place, hf_model, [each for name in wanted for each in groups[name]])
    except NeedsWholeLoad as reason:
        raise DataError(f"The weights of {source.path} cannot be read: {reason}.") from reason
    except SafetensorError as error:
        raise damaged(source, error) from error
    tensors: dict[str, tuple[Path, str]] = {}
    for name in wanted:
        named = next((each for each in [name, *groups[name]] if each in found), None)
        if named is None:
            raise DataError(
                f"The weights of {source.path} must hold {name}, and do not. "
                "Give the folder of the original model."
            )
        tensors[name] = found[named]
    return WeightFiles(tensors)


def read_layer(source: ModelSource, files: WeightFiles, prefix: str, module: nn.Module) -> None:
    """Fill a layer with its weights.

    Raises:
        DataError: They have another shape, are damaged or not finite.
    """
    for name, target in module.state_dict().items():
        path, stored = files.tensors[f"{prefix}.{name}"]
        try:
            shape = stored_shape(path, stored, source)
            bad = files.read(f"{prefix}.{name}", target) if shape == list(target.shape) else 0
        except SafetensorError as error:
            raise damaged(source, error) from error
        if shape != list(target.shape):
            raise DataError(
                f"The weights of {source.path} must fit its config.json, but {stored} is {shape} "
                f"and not {list(target.shape)}. Fetch or save the model again."
            )
        if bad:
            raise DataError(
                f"Weights must be finite numbers, but {stored} of {source.path} holds {bad:,} "
                "that are not. Fetch or save the model again."
            )


def stored_shape(path: Path, name: str, source: ModelSource) -> list[int]:
    """The shape of a weight in a file.

    Raises:
        DataError: It is of fewer than 16 bits, which need scales that are not read.
    """
    with safe_open(path, framework="pt") as file:
        weight = file.get_slice(name)
        if (found := weight.get_dtype()) not in FORMATS:
            raise DataError(
                f"The weights of {source.path} must hold {name} as numbers of 16 bits or more, and "
                f"hold {found}. Give the folder of the original model."
            )
        return list(weight.get_shape())
