"""The teacher's output head in a store, with which hidden states become logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from limbeck.errors import DataError
from limbeck.files import manifest, publish
from limbeck.losses import Divided, Head, Multiplied, Softcap, Transform

FOLDER, FILE = "head", "head.safetensors"
TRANSFORMS: dict[str, type[Any]] = {
    each.__name__.lower(): each for each in (Softcap, Multiplied, Divided)
}


def write_head(store: Path, head: Head) -> None:
    """Publish a head in a store, unless it has one; see `publish_once`."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    settings = {"finish": json.dumps(transform_facts(head.transform), sort_keys=True)}

    def write(folder: Path) -> None:
        save_file(tensors, folder / FILE, metadata=settings)

    publish_once(store / FOLDER, write)


def publish_once(final: Path, write: Callable[[Path], None]) -> None:
    """Publish a folder of a store, unless it exists; the caller holds the store's lock."""
    if manifest(final) is not None:
        return
    if final.exists():
        raise DataError(
            f"{final} must be as it was published, and is damaged. Run `limbeck store repair "
            f"{final.parent}`, and then the same command again."
        )
    for stale in final.parent.glob(f".tmp-{final.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    publish(final, write, {})


def read_head(store: Path) -> Head:
    """The head of a store, on the CPU."""
    folder = store / FOLDER
    if manifest(folder) is None:
        raise DataError(
            f"The store {store} holds hidden states and must have the teacher's head in {folder}, "
            "which is missing or damaged. Copy it from another part of the same recording, or "
            "record again."
        )
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            facts = json.loads(file.metadata()["finish"])
            weight = file.get_tensor("weight")
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118
        kind = facts.pop("type")
        transform = None if kind == "plain" else TRANSFORMS[kind](**facts)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{folder / FILE} must be a head, but cannot be read: {error}.") from error
    return Head(weight, bias, transform)


def transform_facts(transform: Transform | None) -> dict[str, Any]:
    """A logit transform as JSON."""
    if transform is None:
        return {"type": "plain"}
    assert type(transform) in TRANSFORMS.values(), f"{transform} cannot be stored"
    assert dataclasses.is_dataclass(transform)
    return {"type": type(transform).__name__.lower(), **dataclasses.asdict(transform)}
