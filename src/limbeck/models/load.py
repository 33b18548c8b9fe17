"""Models from folders, the hub and GGUF files, checked before anything is computed with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from limbeck.errors import ConfigError, DataError, TryLaterError
from limbeck.models.attention import attention_of
from limbeck.models.build import empty, from_config, hollow
from limbeck.models.causal_lm import CausalLM
from limbeck.models.gguf import load_gguf
from limbeck.models.prove import prove_documents_apart, prove_head
from limbeck.models.quiet import quiet
from limbeck.models.source import (
    ModelLocation,
    ModelSource,
    damaged,
    find,
    find_config,
    first_line,
    read_config,
    refuse_unknown_kinds,
)
from limbeck.models.weight_files import NeedsWholeLoad, WeightFiles, find_weights
from limbeck.tokenizers import load_tokenizer, prove_same_vocabulary


def load_model(source: ModelSource, *, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Load a causal LM in eval mode, and prove its head and its packing.

    Raises:
        ConfigError: It is not there, or is a model limbeck cannot use.
        DataError: Its weights are damaged or not all there.
        TryLaterError: The hub does not answer.
    """
    place = find(source)
    with quiet():
        if place.name.endswith(".gguf"):
            hf_model = load_gguf(place, dtype)
            refuse_unknown_kinds(source.path, hf_model.config)
        else:
            hf_model = _from_pretrained(source, place, read_config(source, place), dtype)
    model = CausalLM(hf_model).to(device).eval()
    prove_head(model)
    prove_documents_apart(model)
    return model


def load_models(
    sources: Sequence[ModelSource], *, device: torch.device, dtype: torch.dtype
) -> tuple[list[CausalLM], PreTrainedTokenizerBase]:
    """Models, cut to the vocabulary they share, and the first one's tokenizer."""
    for source in sources:
        find(source)  # refuses code of an unpinned commit before a tokenizer could run it
    tokenizers = [
        load_tokenizer(s.path, revision=s.revision, trust_remote_code=s.trust_remote_code)
        for s in sources
    ]
    models = [load_model(source, device=device, dtype=dtype) for source in sources]
    proof = prove_same_vocabulary(
        tokenizers[-1],
        tokenizers[0],
        student_rows=models[-1].vocabulary_rows,
        teacher_rows=models[0].vocabulary_rows,
    )
    for model in models:
        model.vocabulary_size = proof.size
    return models, tokenizers[0]


def open_model(source: ModelSource, *, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Open a causal LM whose weights stay in their files until `distributed.shard` reads them.

    The model is on the meta device and costs no memory. Sharding proves its head and its packing.
    Where transformers does more to the weights than cast and rename them, the model is loaded
    whole, and `whole_because` says why.
    """
    try:
        return _open(source, dtype)
    except NeedsWholeLoad as reason:
        model = load_model(source, device=device, dtype=dtype)
        model.whole_because = str(reason)
        return model


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


def reopened(
    model: CausalLM, config: PreTrainedConfig, files: WeightFiles, dtype: torch.dtype
) -> CausalLM:
    """A model on the meta device with another configuration and other weight files."""
    made = CausalLM(hollow(config, dtype)).eval()
    made.weight_files = files
    made.end_like(model)
    made.vocabulary_size = model.vocabulary_size
    return made


def new_model(
    config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype, seed: int
) -> CausalLM:
    """A model with random weights, in eval mode; equal seeds give equal weights on every device."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hf_model = from_config(config, dtype)
    except (ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"No {config.model_type} model can be made of this configuration: {first_line(error)}"
        ) from error
    return CausalLM(hf_model).to(device).eval()


def copied_model(
    config: PreTrainedConfig,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> CausalLM:
    """A new model in eval mode with copies of these weights, which must be all of its weights."""
    hf_model = empty(config, dtype)
    hf_model.load_state_dict(dict(weights))
    return CausalLM(hf_model).to(device).eval()


def shared_model(model: CausalLM) -> CausalLM:
    """A model with its own modules that shares the weights and buffers of another, in eval mode.

    Adapters added to one do not affect the other; a change of a weight changes both.
    """
    tensors = [*model.hf_model.parameters(), *model.hf_model.buffers()]
    # deepcopy takes what stands in its memo for copied already.
    made = CausalLM(copy.deepcopy(model.hf_model, {id(tensor): tensor for tensor in tensors}))
    made.vocabulary_size = model.vocabulary_size
    return made.eval()


def _open(source: ModelSource, dtype: torch.dtype) -> CausalLM:
    place = find(source)
    if place.name.endswith(".gguf"):
        raise NeedsWholeLoad("a .gguf file is decoded whole")
    if source.trust_remote_code:
        raise NeedsWholeLoad("its Python may do more to its weights than cast and rename them")
    config = read_config(source, place)
    try:
        model = CausalLM(hollow(config, dtype)).eval()
        model.weight_files, absent = find_weights(place, model.hf_model)
    except SafetensorError as error:
        raise damaged(source, error) from error
    except (ValueError, KeyError, RuntimeError, ZeroDivisionError, ImportError) as error:
        raise NeedsWholeLoad(first_line(error)) from error  # whose errors name the cause
    _require_all(source, absent)
    with suppress(OSError):  # without generation_config.json the configuration applies
        model.hf_model.generation_config = GenerationConfig.from_pretrained(
            place.name, revision=place.commit or "main"
        )
    return model


def _require_all(source: ModelSource, absent: Sequence[str]) -> None:
    if absent:
        raise DataError(
            f"The weights of {source.path} must fill the whole model, but {len(absent)} are absent "
            f"or of another shape: {', '.join(absent[:5])}. Fetch or save the model again."
        )


def _from_pretrained(
    source: ModelSource, place: ModelLocation, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    load: Any = AutoModelForCausalLM.from_pretrained  # what it returns depends on a flag
    try:
        hf_model, info = load(
            place.name,
            config=config,
            revision=place.commit,
            trust_remote_code=source.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention_of(config),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except SafetensorError as error:
        raise damaged(source, error) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if place.commit is not None and isinstance(error, OSError) and _network(error):
            raise TryLaterError(
                f"The weights of {source.path} could not be fetched: {first_line(error)} Try again."
            ) from error
        raise ConfigError(
            f"{source.path} cannot be loaded from safetensors: {first_line(error)}"
        ) from error
    others = [
        f"{name} is {list(found)} in the file and {list(wanted)} in config.json"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    _require_all(source, sorted(info["missing_keys"]) + others)
    assert isinstance(hf_model, PreTrainedModel)
    return hf_model


def _network(error: OSError) -> bool:
    """Whether a failed load is the network's fault, not that of what the hub holds."""
    return "safetensors" not in str(error) or "connect" in str(error).lower()
