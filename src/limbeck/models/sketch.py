"""Models that have shapes and no weights, to plan a run without them."""

from __future__ import annotations

import torch

from limbeck.errors import ConfigError
from limbeck.models.build import empty
from limbeck.models.causal_lm import CausalLM
from limbeck.models.quiet import quiet
from limbeck.models.source import ModelSource, find_config, first_line, read_config


def sketched_model(source: ModelSource, dtype: torch.dtype) -> CausalLM:
    """A model made of its configuration; call it where tensors have no numbers.

    Args:
        source: A folder with a config.json, or a name on the hub. Weights are not read.
        dtype: Of its parameters.

    Raises:
        ConfigError: It is not there, or is a model limbeck cannot use.
    """
    place = find_config(source)
    if place.name.endswith(".gguf") or source.trust_remote_code:
        raise ConfigError(
            f"A plan without weights needs a config.json that transformers knows, got {source.path}"
            f"{' with trust_remote_code' if source.trust_remote_code else ''}. Give the folder of "
            "the model in transformers' format."
        )
    with quiet():
        config = read_config(source, place)
        try:
            hf_model = empty(config, dtype)
        except (ValueError, KeyError, RuntimeError, ZeroDivisionError, ImportError) as error:
            raise ConfigError(
                f"No model can be made of the configuration of {source.path}: {first_line(error)}"
            ) from error
    return CausalLM(hf_model).eval()
