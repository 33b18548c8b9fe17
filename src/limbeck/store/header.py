"""The header of a store: what it was recorded from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from limbeck.errors import ConfigError, DataError, StorageError
from limbeck.files import raise_if_too_many_open, read_sealed, sealed_text, write_text
from limbeck.store.forms.base import Form, forms
from limbeck.store.hidden_states import Precision

HEADER = "store.json"
FORMAT = 2
"""Version of the file format; other versions are refused."""

MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What a store was recorded from.

    Attributes:
        form: How distributions are stored: `{type: top_k, k: 32, ...}`.
        vocabulary_size: Tokens of the teacher's distributions, without padding rows.
        teacher: Name, revision, weight hash, shape and dtype.
        sequence_length: Longest window, in positions.
        layers: 0-based teacher layers whose outputs are recorded, ascending.
        layer_precision: Precision of those; see the form `hidden`.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    form: Mapping[str, Any]
    vocabulary_size: int
    num_shards: int = 1
    teacher: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    template: str = ""
    data: str = ""
    sequence_length: int
    seed: int = 0
    layers: tuple[int, ...] = ()
    layer_precision: Precision = "exact"
    limbeck: str = ""
    format: int = FORMAT

    def make_form(self) -> Form:
        """The form that encodes and decodes its distributions."""
        return forms.bind(self.form, "form")(self.vocabulary_size)

    def to_json(self) -> dict[str, Any]:
        """All fields, as in the file."""
        return dataclasses.asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that determine the recorded numbers, as JSON.

        The version that recorded them is not among them, nor the path and the revision of the
        teacher: its weights are identified by their hash.
        """
        facts: dict[str, Any] = json.loads(json.dumps(self.to_json()))
        del facts["limbeck"]
        for name in ("name", "revision"):
            facts["teacher"].pop(name, None)
        return facts

    @property
    def sha256(self) -> str:
        """Hash of `identity`; every shard names the header it belongs to."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def owns(self, sha256: str) -> bool:
        """Whether a shard with this header hash belongs to the same recording.

        Shards of earlier releases hold a hash of all fields, the version and the path included.
        """
        return sha256 in (self.sha256, hashlib.sha256(canonical(self).encode()).hexdigest())

    def conflicts(self, other: StoreHeader) -> list[str]:
        """Where another recording would hold other numbers; `other` is what is wanted."""
        return compare(self.identity, other.identity)

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """The wanted fields that differ, as `field: 3 in the store, 4 wanted`."""
        facts = json.loads(json.dumps(self.to_json()))
        return compare({name: facts.get(name) for name in wanted}, wanted)


def compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two nested mappings differ; `prefix` precedes the names of the fields."""
    differing = []
    for name in sorted({*recorded, *wanted}):
        ours, theirs = recorded.get(name), wanted.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            differing += compare(ours, theirs, f"{prefix}{name}.")
        elif json.dumps(ours) != json.dumps(theirs):  # 1 and 1.0 are equal, and hash differently
            differing.append(f"{prefix}{name}: {ours!r} in the store, {theirs!r} wanted")
    return differing


def canonical(header: StoreHeader) -> str:
    """The header as JSON with sorted keys."""
    return json.dumps(header.to_json(), sort_keys=True)


def create(folder: Path, header: StoreHeader) -> None:
    """Create a store, or resume one with the same identity.

    Several processes may call this at once.

    Raises:
        ConfigError: The folder holds files but no store.
        DataError: The folder holds a store recorded from something else.
        StorageError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"A store needs a folder that can be written, and {folder} is none ({error}). Choose "
            "another folder."
        ) from error
    require_store_or_new(folder)
    if (folder / HEADER).exists():
        found = read_header(folder)
        if differing := found.conflicts(header):
            raise DataError(
                f"The store {folder} was recorded from something else ({'; '.join(differing)}). "
                "Change the recipe to match, or record into another folder."
            )
        return
    write_text(folder / HEADER, sealed_text(header.to_json()))


def require_store_or_new(folder: Path) -> None:
    """Refuse a folder that holds other files."""
    if (folder / HEADER).exists() or not folder.is_dir():
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name[0] != "."):
        few = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ConfigError(
            f"A store must start in a new folder, and {folder} holds {few} and no {HEADER}. Choose "
            f"another folder; if a store lost its {HEADER}, copy that from another part of it."
        )


def read_header(folder: Path) -> StoreHeader:
    """What a store was recorded from.

    Raises:
        DataError: There is no store, its header is damaged, or another version wrote it.
    """
    path = folder / HEADER
    try:
        facts = read_sealed(path, MAX_HEADER_BYTES)
        if facts.get("format") != FORMAT:
            raise ValueError(f"format {facts.get('format')!r}, this limbeck reads {FORMAT}")
        header: StoreHeader = TypeAdapter(StoreHeader).validate_json(json.dumps(facts))
        check_bounds(header)
        header.make_form()
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} must be a store, but has no {HEADER}. Name the folder that was "
            "recorded into."
        ) from error
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise_if_too_many_open(error)
        raise DataError(
            f"{path} must be a store's header, but cannot be read: {error}. Copy it from another "
            "part of the same recording, or record again."
        ) from error
    return header


def check_bounds(header: StoreHeader) -> None:
    """Limit the sizes of a header, which determine how much memory is allocated."""
    for name, value, limit in (
        ("vocabulary_size", header.vocabulary_size, 1 << 24),
        ("sequence_length", header.sequence_length, 1 << 24),
        ("num_shards", header.num_shards, 1 << 20),
    ):
        if not 1 <= value <= limit:
            raise ValueError(f"{name} must be from 1 to {limit:,}, got {value:,}")
