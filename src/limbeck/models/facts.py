"""Facts that identify a model: name, commit, hash, shape."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from limbeck.errors import ConfigError
from limbeck.files import expanded, sha256, size
from limbeck.models.causal_lm import CausalLM
from limbeck.models.source import ModelLocation, ModelSource, find, find_config, open_config
from limbeck.models.weight_files import files_fingerprint


def model_facts(source: ModelSource, model: CausalLM, *, hashed: bool = True) -> dict[str, Any]:
    """Name, commit, hash of the weight files, and shape of a model; JSON.

    Args:
        hashed: False leaves the hash out: it reads every byte, and one rank is enough.
    """
    place = find_config(source)
    return {
        "name": source.path,
        "revision": place.commit,
        "weights_sha256": files_hash(place.name, place.folder) if hashed else None,
        **shape_facts(model),
    }


def shape_facts(model: CausalLM) -> dict[str, Any]:
    """Family, size and number format of a model; JSON."""
    return {
        "family": model.family,
        "parameters": model.num_parameters,
        "bytes": num_bytes(model),
        "layers": model.num_layers,
        "width": model.width,
        "vocabulary_rows": model.vocabulary_rows,
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
    }


def configured_shape(path: str) -> dict[str, Any]:
    """Family and size of a model of any kind, from its configuration alone; JSON.

    Args:
        path: Hub name, or folder with config.json; no weights need to be there.

    Raises:
        ConfigError: There is no configuration, or it is not of a language model.
    """
    source, folder = ModelSource(path), expanded(path)
    is_here = (folder / "config.json").is_file()
    whole = open_config(
        source, ModelLocation(str(folder), folder, None) if is_here else find(source)
    )
    plain = whole.get_text_config().to_dict()
    wanted = {
        "layers": "num_hidden_layers",
        "width": "hidden_size",
        "vocabulary_rows": "vocab_size",
    }
    shape = {name: plain.get(theirs) for name, theirs in wanted.items()}
    if missing := [wanted[name] for name, value in shape.items() if type(value) is not int]:
        raise ConfigError(
            f"The configuration of {path} must give the size of a language model, and has no "
            f"{', '.join(missing)}. Choose a decoder-only model."
        )
    limit = plain.get("max_position_embeddings")
    return {
        "family": whole.model_type,
        **shape,
        "max_positions": limit if type(limit) is int else None,
    }


def num_bytes(model: CausalLM) -> int:
    """Bytes of a model's parameters, tied ones counted once."""
    packed = sum(layer.nbytes for layer in model.packed.values())
    return packed + sum(p.nbytes for p in model.parameters())


def loading_notes(name: str, model: CausalLM) -> tuple[str, ...]:
    """A note if a model was loaded whole instead of by rows, with its size."""
    if model.whole_because is None:
        return ()
    return (
        f"{name}: every rank loads all {size(num_bytes(model))} of the model before it is sharded, "
        f"because {model.whole_because}.",
    )


def weights_fingerprint(source: ModelSource) -> str:
    """`files_fingerprint` of a model's weight files."""
    place = find_config(source)
    return files_fingerprint(weight_paths(place.name, place.folder))


def weight_paths(name: str, folder: Path) -> list[Path]:
    """A model's weight files: the .gguf file, or the folder's safetensors, sorted by name."""
    return [Path(name)] if name.endswith(".gguf") else sorted(folder.glob("*.safetensors"))


def files_hash(name: str, folder: Path) -> str:
    """sha256 over a model's weight files: of the .gguf file, or of the folder's safetensors.

    For a folder it is the hash of the lines `name sha256`, sorted by name.
    """
    files = weight_paths(name, folder)
    if name.endswith(".gguf"):
        return sha256(files[0])
    lines = [f"{p.name} {sha256(p)}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
