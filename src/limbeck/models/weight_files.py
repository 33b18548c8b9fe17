"""Weights that stay in their safetensors files until each rank reads its own rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from limbeck.errors import TryLaterError
from limbeck.models.source import ModelLocation, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STEP_BYTES = 1 << 24
"""Rows are copied in steps of about this size, so that a large weight is never held twice. Looking
for numbers that are not finite takes about two steps of memory."""
SAMPLES, SAMPLE_BYTES = 16, 4096


class NeedsWholeLoad(Exception):  # noqa: N818  (a reason, not an error)
    """Why a model's weights cannot be read by rows; transformers must load the whole model."""


@dataclass(frozen=True)
class WeightFiles:
    """Where each weight of a model is in a checkpoint.

    Attributes:
        tensors: By name in the model's state dict: the file, and the name in it. Of tied weights
            one name is enough.
        rounded_to: Data type that every weight passes through before it is cast to its own.
    """

    tensors: Mapping[str, tuple[Path, str]]
    rounded_to: torch.dtype | None = None

    def read(self, name: str, target: Tensor, first_row: int = 0) -> int:
        """Copy a weight's rows into a tensor, cast to the tensor's data type.

        Args:
            name: In the model's state dict.
            target: As many rows as it has are read; of any device and data type.
            first_row: Of the weight, where the target begins.

        Returns:
            How many of the numbers read are not finite.
        """
        path, stored = self.tensors[name]
        with safe_open(path, framework="pt") as file:
            if target.ndim == 0:
                target.copy_(self._rounded(file.get_tensor(stored)))
                return int((~target.isfinite()).sum())
            rows = file.get_slice(stored)
            row_bytes = max(target[:1].numel() * target.element_size(), 1)
            step = max(STEP_BYTES // row_bytes, 1)
            bad = 0
            for start in range(0, len(target), step):
                part = target[start : start + step]
                first = first_row + start
                part.copy_(self._rounded(rows[first : first + len(part)]))
                bad += int((~part.isfinite()).sum())
        return bad

    def renamed(self, names: Mapping[str, str]) -> WeightFiles:
        """The same files for a model with other names: each new name with its old one."""
        kept = {new: self.tensors[old] for new, old in names.items() if old in self.tensors}
        return replace(self, tensors=kept)

    def fingerprint(self) -> str:
        """`files_fingerprint` of the files."""
        return files_fingerprint({path for path, _ in self.tensors.values()})

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor if self.rounded_to is None else tensor.to(self.rounded_to)


def files_fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over sizes, headers and samples of weight files; differs for other weights.

    It compares copies on several machines; `files_hash` identifies a model.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            is_safetensors = path.suffix == ".safetensors"
            begin = 8 + int.from_bytes(file.read(8), "little") if is_safetensors else 0
            file.seek(0)
            digest.update(file.read(begin))
            for sample in range(SAMPLES):
                file.seek(begin + (size - begin) * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def find_weights(place: ModelLocation, hf_model: PreTrainedModel) -> tuple[WeightFiles, list[str]]:
    """Find a model's weights in its checkpoint.

    Returns:
        The files, and the weights that are absent or of another shape.
    """
    typed: Any = hf_model  # its class attributes carry no types
    if typed._keep_in_fp32_modules or typed._keep_in_fp32_modules_strict:
        raise NeedsWholeLoad("transformers keeps some weights of this family in float32")
    state: dict[str, Tensor] = hf_model.state_dict()
    named = name_in(hf_model, state)
    found: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, list[int]] = {}
    for path in checkpoint_files(place):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118  (it is no mapping)
                name, converted = named(stored)
                if converted is not None:
                    raise NeedsWholeLoad(f"transformers converts {stored} while it loads")
                if name in state:
                    found[name] = (path, stored)
                    shapes[name] = list(file.get_slice(stored).get_shape())
    absent = [
        f"{name} is {shape} in the file and {list(state[name].shape)} in config.json"
        for name, shape in shapes.items()
        if shape != list(state[name].shape)
    ]
    for names in tied_groups(hf_model):
        present = [name for name in names if name in found]
        if len(present) > 1:
            raise NeedsWholeLoad(f"its files hold tied weights twice ({', '.join(present)})")
        if not present:
            absent.append(names[0])
        else:
            found[names[0]] = found.pop(present[0])
    return WeightFiles(found), sorted(absent)


def tied_groups(hf_model: PreTrainedModel) -> Iterator[list[str]]:
    """The names of each weight and buffer in the state dict; the first is its own."""
    state = hf_model.state_dict()
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *hf_model.named_parameters(remove_duplicate=False),
        *hf_model.named_buffers(remove_duplicate=False),
    ):
        if name in state:
            names.setdefault(id(tensor), []).append(name)
    yield from names.values()


def find_named(
    place: ModelLocation, hf_model: PreTrainedModel, names: Sequence[str]
) -> dict[str, tuple[Path, str]]:
    """Some weights of a model in its checkpoint; files without any of them are not fetched.

    Args:
        names: In the model's state dict.

    Returns:
        By name: the file, and the name in it. A weight that is absent, or that transformers
        converts while it loads, is left out.

    Raises:
        NeedsWholeLoad: The checkpoint is not in safetensors files under their usual names.
    """
    named = name_in(hf_model, hf_model.state_dict())
    found: dict[str, tuple[Path, str]] = {}
    for stored, file in stored_names(place).items():
        name, converted = named(stored)
        if name in names and converted is None and (path := fetched(place, file)) is not None:
            found[name] = (path, stored)
    return found


def name_in(
    hf_model: PreTrainedModel, state: dict[str, Tensor]
) -> Callable[[str], tuple[str, str | None]]:
    """Maps a name in a checkpoint to the state dict's, and to the conversion it needs, if any."""
    transforms = get_model_conversion_mapping(hf_model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix = hf_model.base_model_prefix
    return lambda stored: rename_source_key(stored, renamings, converters, prefix, state)


def stored_names(place: ModelLocation) -> dict[str, str]:
    """The names of a checkpoint's weights, each with its file."""
    if (index := weight_map(place)) is not None:
        return index
    [single] = checkpoint_files(place)
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def weight_map(place: ModelLocation) -> dict[str, str] | None:
    """The file of each weight, from a checkpoint's index; None without one."""
    path = fetched(place, INDEX)
    if path is None:
        return None
    try:
        index: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return dict(index)
    except (ValueError, TypeError, KeyError) as error:
        raise NeedsWholeLoad(f"{INDEX} names no weights ({type(error).__name__})") from error


def checkpoint_files(place: ModelLocation) -> list[Path]:
    """The files a checkpoint's index names, or its only one; fetched where they are on the hub."""
    index = weight_map(place)
    if index is None:
        single = fetched(place, SINGLE)
        if single is None:
            raise NeedsWholeLoad(f"it has neither {SINGLE} nor {INDEX}")
        return [single]
    names = sorted(set(index.values()))
    paths = [fetched(place, name) for name in names]
    if None in paths:
        raise NeedsWholeLoad(f"{names[paths.index(None)]} of {INDEX} is absent")
    return [path for path in paths if path is not None]


def fetched(place: ModelLocation, name: str) -> Path | None:
    """A file of a model, None where it has none of the name."""
    if place.commit is None:
        path = place.folder / name
        return path if path.is_file() else None
    try:
        local = hf_hub_download(
            place.name, name, revision=place.commit, local_files_only=place.is_offline
        )
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise TryLaterError(
            f"The weights of {place.name} could not be fetched: {first_line(error)} Try again."
        ) from error
    return Path(local)
