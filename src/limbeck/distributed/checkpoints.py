"""Checkpoints of a run: safetensors and JSON, whole or not there, never a pickle.

A checkpoint is a directory `step-000250` with one safetensors file a rank (weights and optimizer
state under flat names), `state.json` (numbers of the optimizer, random states in hexadecimal, what
the loop wants to remember) and a manifest. PyTorch's `dcp.load` would unpickle `.metadata`; its
Hugging Face reader and writer use none, but the reader trusts a directory: it skips what is missing
and reads what is stray. Hence the manifest first, and targets of NaN that must all be overwritten.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from limbeck.distributed.ranks import World, broadcast_object, together
from limbeck.distributed.sharding import local
from limbeck.errors import DataError, StorageError
from limbeck.files import damage, manifest, set_aside

FLAT = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)
STATE = "state.json"
FORMAT = 1
REPLACED = "replaced"
"""Why `--resume-from` sets later checkpoints aside, as their new names begin."""

Optimizers = Sequence[torch.optim.Optimizer]


class Parts(NamedTuple):
    """A module and its optimizers as flat names."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    tensors: dict[str, Tensor]
    """What goes to safetensors: all tensors, tied ones once."""
    numbers: dict[str, Any]
    """What goes to JSON."""
    tied: dict[str, str]
    """Second names of tied weights, to their first."""


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint; names sort as steps do.

    Example:
        >>> checkpoint_name(250)
        'step-000250'
    """
    return f"step-{step:06d}"


def load_checkpoint(
    folder: Path, distiller: nn.Module, optimizers: Optimizers, world: World
) -> dict[str, Any]:
    """Put weights, optimizer state and random states back; every rank calls it.

    Args:
        folder: One checkpoint, of any number of ranks.
        distiller: Made as when it was saved; its values do not matter.
        optimizers: The same; empty loads the weights alone, and leaves random states as they are.
        world: The ranks.

    Returns:
        The facts it was saved with.

    Raises:
        DataError: It is damaged, or of another model or optimizer. Nothing was loaded then.
    """
    together(lambda: require_whole(folder), world, main_only=True)
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if saved["format"] != FORMAT:
        raise DataError(
            f"{folder} must have checkpoint format {FORMAT}, has {saved['format']}: it was written "
            "by another version of limbeck. Resume with that version."
        )
    parts = parts_of(distiller, optimizers)
    fill(parts.tensors, folder, world)
    weights: dict[str, Any] = {
        name: parts.tensors[parts.tied.get(name, name)] for name in parts.weights
    }
    facts: dict[str, Any] = saved["facts"]
    if not optimizers:
        distiller.load_state_dict(weights, strict=False)  # `fill` was: frozen ones are not saved
        return facts
    state: dict[str, Any] = {
        name: parts.tensors[name] if name in parts.tensors else saved["numbers"][name]
        for name in parts.optimizer
    }
    set_state_dict(
        distiller,
        list(optimizers),
        model_state_dict=weights,
        optim_state_dict=state,
        options=FLAT,
    )
    if world.rank < len(saved["random"]):
        set_random_state(saved["random"][world.rank], world.device)
    return facts


def fill(tensors: dict[str, Tensor], folder: Path, world: World) -> None:
    """Read tensors into fresh memory, and be sure that every one of their values was read."""
    for name, tensor in tensors.items():
        blank = torch.empty_like(tensor)
        tensors[name] = blank.fill_(torch.nan) if blank.is_floating_point() else blank.zero_()
    reader = HuggingFaceStorageReader(str(folder))
    known = set(reader.read_metadata().state_dict_metadata)
    optional = {name for name in known if name.startswith(("state.", "param_groups."))}
    wrong = (set(tensors) - known) | (known - set(tensors) - optional)
    if wrong:
        raise DataError(
            f"{folder} must hold the weights of this student and objective; "
            f"{sorted(wrong)[:5]} are in one of the two only. Resume with the recipe it was "
            "saved with."
        )
    with alone_quietly():
        load(tensors, storage_reader=reader, no_dist=world.size == 1)
    left = [name for name, tensor in tensors.items() if has_nan(tensor)]
    if left:
        raise DataError(f"{folder} must hold whole tensors, but of {left[:5]} some values miss.")


def set_damaged_aside(checkpoints: Path, world: World) -> tuple[str, ...]:
    """Rename checkpoints newer than the newest whole one, so that rotation never deletes them.

    Every rank calls it.

    Returns:
        For each, newest first, its name, what is damaged, and its new name.

    Raises:
        DataError: There are checkpoints, and none of them is whole.
    """
    notes: list[str] = []

    def rename() -> None:
        whole = latest(checkpoints)
        damaged = [path for path in newest_first(checkpoints) if path != whole]
        if whole is not None:
            damaged = [path for path in damaged if step_of(path) > step_of(whole)]
        reasons = [f"{path}: {damage(path) or 'it is of another step'}" for path in damaged]
        if damaged and whole is None:
            raise DataError(
                f"A run can only be resumed from a whole checkpoint, and none is left: "
                f"{'; '.join(reasons)}. Restore the file, or start again with --overwrite."
            )
        for path, reason in zip(damaged, reasons, strict=True):
            notes.append(f"{reason}; moved to {set_aside(path, 'damaged').name}")

    together(rename, world, main_only=True)
    return tuple(broadcast_object(notes, world))


def newest_first(checkpoints: Path) -> list[Path]:
    """Every checkpoint by its name, whole or damaged, the newest first."""
    return sorted(checkpoints.glob("step-*"), key=step_of, reverse=True)


def latest(checkpoints: Path, world: World | None = None) -> Path | None:
    """The newest whole checkpoint; what has no valid manifest is passed over.

    Args:
        checkpoints: Directory of checkpoints.
        world: With it rank 0 decides for all, so that no two ranks differ.
    """
    if world is not None and world.size > 1:
        found = latest(checkpoints) if world.is_main else None
        name = broadcast_object(None if found is None else found.name, world)
        return None if name is None else checkpoints / name
    return next((path for path in newest_first(checkpoints) if is_checkpoint(path)), None)


def prune(checkpoints: Path, newest: Path, keep: int, protected: Collection[int]) -> None:
    """Remove old checkpoints after the newest was verified; called on rank 0.

    Those that `--resume-from` replaced go when the run has come as far again.

    Args:
        checkpoints: Directory of checkpoints.
        newest: The one just saved.
        keep: How many of the newest stay.
        protected: Steps whose checkpoints stay as well.
    """
    if manifest(newest) is None:
        return
    passed = [p for p in newest_first(checkpoints) if 0 <= step_of(p) <= step_of(newest)]
    for path in passed[keep:]:
        if step_of(path) not in protected:
            discard(path)
    for path in checkpoints.glob(f"{REPLACED}-step-*"):
        if 0 <= replaced_step(path) <= step_of(newest):
            discard(path)


def discard(path: Path) -> None:
    """Remove a directory; `sweep` removes the rest if the process is killed meanwhile."""
    if not path.exists():
        return
    away = path.parent / f".tmp-old-{path.name}"
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a complete checkpoint whose facts match its name."""
    found = manifest(path)
    return found is not None and found.get("step") == step_of(path)


@contextmanager
def alone_quietly() -> Iterator[None]:
    """Suppress DCP's single-process warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def first_cause(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed; an OSError if it was one."""
    causes = [failure[0] for failure in error.failures.values()]
    disk = [cause for cause in causes if isinstance(cause, OSError)]
    return (disk or causes or [error])[0]


def require_whole(path: Path) -> None:
    """Refuse what is not a whole checkpoint."""
    if not is_checkpoint(path):
        raise DataError(
            f"{path} must be a whole checkpoint, but its files are not those of its manifest: it "
            "is damaged or half-written. Resume from an older one."
        )


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 when there is none."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def replaced_step(path: Path) -> int:
    """The step of a checkpoint that was set aside as `REPLACED`; -1 when there is none.

    Example:
        >>> replaced_step(Path("replaced-step-000012-0"))
        12
    """
    return step_of(Path(path.name.removeprefix(f"{REPLACED}-").rpartition("-")[0]))


def parts_of(distiller: nn.Module, optimizers: Optimizers) -> Parts:
    """Everything to save, under flat names; frozen weights are not included."""
    weights: dict[str, Any]
    state: dict[str, Any]
    if optimizers:
        weights, state = get_state_dict(distiller, list(optimizers), options=FLAT)
    else:
        weights, state = dict(distiller.state_dict()), {}
    named_parameters = distiller.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named_parameters if not parameter.requires_grad}
    weights = {name: value for name, value in weights.items() if name not in frozen}
    tied = tied_names(distiller)
    named = {k: v for k, v in (weights | state).items() if k not in tied}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in named.items() if k not in tensors}
    return Parts(weights, state, tensors, numbers, tied)


def tied_names(module: nn.Module) -> dict[str, str]:
    """Second and further names of parameters, to their first; safetensors has no ties."""
    first: dict[nn.Parameter, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in first:
            tied[name] = first[parameter]
        else:
            first[parameter] = name
    return tied


def random_state(device: torch.device) -> dict[str, str]:
    """Random states of this process, in hexadecimal."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def set_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """Put random states back."""
    torch.set_rng_state(from_hex(states["cpu"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(from_hex(states["cuda"]), device)


def from_hex(text: str) -> Tensor:
    """A byte tensor from hexadecimal."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def has_nan(tensor: Tensor) -> bool:
    """Whether this rank's part of a tensor holds a NaN."""
    return bool(local(tensor).isnan().any())


def require_room(final: Path, needed: int) -> None:
    """Refuse to begin a checkpoint that cannot end well."""
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise StorageError(
            f"{final} needs {needed:,} bytes, and {free:,} are free. Older checkpoints are intact. "
            "Free some space, lower checkpoint.keep, or choose another output."
        )
