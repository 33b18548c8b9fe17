"""Models from GGUF files, dequantised and made ordinary, so that they can be saved."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from limbeck.errors import ConfigError
from limbeck.models.build import empty
from limbeck.models.source import ModelLocation, first_line


def load_gguf(place: ModelLocation, dtype: torch.dtype) -> PreTrainedModel:
    """A GGUF file as a plain model.

    The dequantised weights are the model; the original before quantisation is not available.
    """
    file = Path(place.name)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, attn_implementation="eager"
        )
    except (OSError, ValueError, LookupError, NotImplementedError, struct.error) as error:
        raise ConfigError(
            f"{file} cannot be read as a GGUF model: {first_line(error)} Check that it is "
            "whole and of a family transformers reads, or give a Hugging Face folder."
        ) from error
    assert isinstance(loaded, PreTrainedModel)
    return plain(loaded, dtype)


def plain(loaded: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model that is not marked as quantised, so that it can be saved."""
    config = plain_config(loaded.config)
    model = empty(config, dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()  # assigned tensors are no longer the tied ones
    model.generation_config = loaded.generation_config
    return model


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A GGUF model's configuration without its quantisation, and with decimal numbers.

    GGUF stores numbers in float32, so 1e-5 comes back as 9.99999974e-06, and every other program
    that reads the folder would compute with another model than the original.
    """
    tree = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path")
    }
    made: PreTrainedConfig = type(config).from_dict(decimal(tree))
    return made


def decimal(value: Any) -> Any:
    """Nested data with every float32 replaced by its shortest decimal.

    Example:
        >>> decimal({"eps": [9.999999747378752e-06, 0.1, 1]})
        {'eps': [1e-05, 0.1, 1]}
    """
    if isinstance(value, dict):
        return {key: decimal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [decimal(inner) for inner in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
