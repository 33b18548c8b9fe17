"""Finds a model, and refuses what limbeck cannot use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)

from limbeck.config.paths import missing_model, not_cached
from limbeck.errors import ConfigError, DataError, TryLaterError
from limbeck.files import expanded
from limbeck.tokenizers.load import hub_answers

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings that count the experts of a mixture."""
MODALITIES = ("vision_config", "audio_config")
"""Settings of what reads something other than text."""


@dataclass(frozen=True)
class ModelSource:
    """A model's place.

    Attributes:
        path: A Hugging Face folder, a .gguf file, or a name on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; None takes the main branch as it is now.
        trust_remote_code: Run Python the model brings along; needs a commit as revision.
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ModelLocation:
    """Where a model was found.

    Attributes:
        name: What transformers is to open: a folder, a file, or a name on the hub.
        folder: Where its files are; for the hub the local copy of one commit.
        commit: The hub's commit, None for a local model.
        is_offline: Whether the hub does not answer, and only what is cached can be used.
    """

    name: str
    folder: Path
    commit: str | None
    is_offline: bool = False


def find(source: ModelSource) -> ModelLocation:
    """Find a model with its weights, locally or on the hub.

    Raises:
        ConfigError: It is not there, is no model, or may not be read.
        TryLaterError: The hub does not answer.
    """
    place = find_config(source)
    if place.commit is None and place.folder == Path(place.name):
        require_safetensors(place.folder)
    return place


def student_inside(folder: Path) -> Path | None:
    """The student of a run's directory; None for a folder that holds a model itself."""
    inside = folder / "student"
    return inside if inside.is_dir() and not (folder / "config.json").is_file() else None


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without weights, or with weights of another kind.

    Raises:
        ConfigError: Naming the folder.
    """
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"Weights must be in safetensors, but {folder} has no .safetensors file (pickled "
            "weights can run code). Convert them: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...)."
        )


def find_config(source: ModelSource) -> ModelLocation:
    """Find a model whose weights need not be there.

    Raises:
        ConfigError: It is not there, is no model, or may not be read.
        TryLaterError: The hub does not answer.
    """
    if problem := missing_model(source.path):
        raise ConfigError(problem)
    path = expanded(source.path)
    if path.is_file():
        return ModelLocation(str(path), path.parent, None)
    if path.is_dir():
        require_json(path / "config.json")
        return ModelLocation(str(path), path, None)
    return on_hub(source)


def require_json(path: Path) -> None:
    """Refuse a file that must hold a JSON object and does not."""
    try:
        defect = "" if isinstance(json.loads(path.read_bytes()), dict) else "it is no object"
    except (OSError, ValueError, RecursionError) as error:
        defect = first_line(error).rstrip(".")
    if defect:
        raise ConfigError(
            f"{path} must hold a JSON object, and does not: {defect}. Fetch or save it again."
        )


def on_hub(source: ModelSource) -> ModelLocation:
    """Find a model on the hub, and the commit its revision means now."""
    where = f"{source.path!r} (revision {source.revision or 'main'})"
    if source.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
        raise ConfigError(
            f"trust_remote_code needs as revision the 40-digit commit that you have read, got "
            f"{source.revision!r} for {source.path!r}. Set it, or leave trust_remote_code out."
        )
    answers = hub_answers(source.path, source.revision)
    try:
        config = Path(
            hf_hub_download(
                source.path,
                "config.json",
                revision=source.revision,
                local_files_only=not answers,
            )
        )
    except HFValidationError as error:
        raise ConfigError(f"{where} is not a name the hub knows: {first_line(error)}") from error
    except LocalEntryNotFoundError as error:
        raise TryLaterError(not_cached(source.path, source.revision)) from error
    except EntryNotFoundError as error:
        raise ConfigError(
            f"{where} must hold config.json, and does not: it is no transformers model. Choose "
            "another."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise TryLaterError(
            f"The hub did not hand out {where}: {first_line(error)} Start again later."
        ) from error
    return ModelLocation(source.path, config.parent, config.parent.name, not answers)


def open_config(source: ModelSource, place: ModelLocation) -> PreTrainedConfig:
    """A model's configuration, of whatever kind the model is."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            place.name, revision=place.commit, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        remedy = "Choose another model, or update transformers."
        if "trust_remote_code" in str(error):
            remedy = "Its own Python needs trust_remote_code: true and a pinned revision."
        raise ConfigError(
            f"The configuration of {source.path} cannot be used: {first_line(error)} {remedy}"
        ) from error
    return config


def read_config(source: ModelSource, place: ModelLocation) -> PreTrainedConfig:
    """A model's configuration, if limbeck can use such a model.

    Raises:
        ConfigError: It is broken, of an unknown family, no causal LM, or of a kind limbeck refuses.
    """
    config = open_config(source, place)
    refuse_unknown_kinds(source.path, config, own_code=source.trust_remote_code)
    return config


def refuse_unknown_kinds(name: str, config: PreTrainedConfig, *, own_code: bool = False) -> None:
    """Refuse the kinds of model that limbeck has no entry for."""
    plain: Mapping[str, Any] = config.to_dict()
    described = f"{name} ({config.model_type})"
    if modality := next((key for key in MODALITIES if plain.get(key)), None):
        raise ConfigError(
            f"A model must read text only, but {described} has a {modality}. limbeck does not "
            "support models of several modalities; give the folder of the text part."
        )
    if experts := next((key for key in EXPERTS if (plain.get(key) or 0) > 1), None):
        raise ConfigError(
            f"A model must be dense, but {described} has {experts} = {plain[experts]}. limbeck "
            "does not support mixtures of experts; choose a dense model."
        )
    if plain.get("quantization_config"):
        raise ConfigError(
            f"Weights must be plain numbers, but {described} is quantised (quantization_config). "
            "Give the original weights, or a .gguf file."
        )
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or own_code
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not plain.get("is_decoder")
    if not causal or is_encoder or plain.get("is_encoder_decoder"):
        raise ConfigError(
            f"A model must be a causal language model, but {described} is not one. Choose a "
            "decoder-only model, as Llama, Qwen, Gemma or Mistral."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, ended with a full stop."""
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    return f"{(line or type(error).__name__).rstrip('.')}."


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where its reason stands below a heading."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{(lines[-1] if lines else type(error).__name__).rstrip('.')}."


def damaged(source: ModelSource, error: Exception) -> DataError:
    """The error for weight files that cannot be read."""
    return DataError(
        f"The weights of {source.path} are damaged: {first_line(error)} Fetch them again."
    )
