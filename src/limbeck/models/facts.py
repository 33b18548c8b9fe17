"""Facts that identify a model: name, commit, hash, shape."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from limbeck.files import sha256, size
from limbeck.models.causal_lm import CausalLM
from limbeck.models.source import ModelSource, find


def model_facts(source: ModelSource, model: CausalLM, *, hashed: bool = True) -> dict[str, Any]:
    """Name, commit, hash of the weight files, and shape of a model; JSON.

    Args:
        hashed: False leaves the hash out: it reads every byte, and one rank is enough.
    """
    place = find(source)
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


def num_bytes(model: CausalLM) -> int:
    """Bytes of a model's parameters, tied ones counted once."""
    return sum(p.nbytes for p in model.parameters())


def loading_notes(name: str, model: CausalLM) -> tuple[str, ...]:
    """A note if a model was loaded whole instead of by rows, with its size."""
    if model.whole_because is None:
        return ()
    return (
        f"{name}: every rank loads all {size(num_bytes(model))} of the model before it is sharded, "
        f"because {model.whole_because}.",
    )


def files_hash(name: str, folder: Path) -> str:
    """sha256 over a model's weight files: of the .gguf file, or of the folder's safetensors.

    For a folder it is the hash of the lines `name sha256`, sorted by name.
    """
    if name.endswith(".gguf"):
        return sha256(Path(name))
    lines = [f"{p.name} {sha256(p)}\n" for p in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
