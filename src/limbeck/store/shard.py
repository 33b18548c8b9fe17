"""One published shard: a Parquet file, an index into it, and its table of frequent tokens."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pydantic import ConfigDict, TypeAdapter, ValidationError

from limbeck.errors import DataError
from limbeck.files import raise_if_too_many_open, sealed_manifest
from limbeck.store.header import StoreHeader
from limbeck.store.index import Index
from limbeck.store.records import EncodedRecord, unseal
from limbeck.store.token_ranks import TokenRanks

DATA, INDEX, RANKS = "data.parquet", "index.bin", "ranks.bin"

SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.binary(16)),
        ("tokens", pyarrow.list_(pyarrow.int32())),
        ("scored", pyarrow.list_(pyarrow.bool_())),
        ("record", pyarrow.binary()),
    ]
)
"""Columns of the Parquet file."""


@dataclass(frozen=True)
class ShardFacts:
    """The manifest of a published shard.

    Attributes:
        header: `StoreHeader.sha256` of the store.
        files: Size in bytes and sha256 of each file.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    header: str
    shard: int
    samples: int
    positions: int
    scored: int
    record_bytes: int
    files: dict[str, tuple[int, str]]


def shard_name(shard: int) -> str:
    """Name of a shard's folder in its store."""
    return f"shard-{shard:05d}"


def shard_facts(folder: Path, shard: int) -> ShardFacts | None:
    """The manifest of a published shard, None without a valid one; no other file is read."""
    facts = sealed_manifest(folder / shard_name(shard))
    try:
        # As JSON: in strict mode a list is a tuple only there.
        return TypeAdapter(ShardFacts).validate_json(json.dumps(facts))
    except ValidationError:
        return None


def finished_shards(folder: Path, header: StoreHeader) -> list[int]:
    """Published shards; their records are not verified."""
    shards = range(header.num_shards)
    return [shard for shard in shards if shard_facts(folder, shard) is not None]


def absent_shards(folder: Path, header: StoreHeader) -> list[int]:
    """Shards that are not in the folder at all, as in the part that one machine recorded."""
    shards = range(header.num_shards)
    return [shard for shard in shards if not os.path.lexists(folder / shard_name(shard))]


@dataclass(frozen=True)
class Shard:
    """A shard, open for reading. It holds no file descriptor: each read opens the file again."""

    path: Path
    facts: ShardFacts
    index: Index
    ranks: TokenRanks

    @classmethod
    def open(cls, folder: Path, shard: int, header: StoreHeader) -> Shard:
        """A shard of a store: manifest, sizes, index and ranks are verified, records when read."""
        path, facts = folder / shard_name(shard), shard_facts(folder, shard)
        if facts is None:
            raise DataError(
                f"Shard {shard} of {folder} must be complete, but {path} has no valid manifest. "
                "Record that shard again."
            )
        try:
            if not header.owns(facts.header) or facts.shard != shard:
                raise DataError("it belongs to another recording")
            check_size(path / DATA, facts.files[DATA][0])
            index = Index.from_bytes(
                verified_bytes(path / INDEX, *facts.files[INDEX]),
                facts.samples,
                facts.files[DATA][0],
            )
            table = verified_bytes(path / RANKS, *facts.files[RANKS])
            ranks = TokenRanks.from_bytes(table, header.vocabulary_size)
        except (DataError, OSError, LookupError) as error:
            raise_if_too_many_open(error)
            raise DataError(
                f"Shard {shard} of {folder} cannot be used: {error}. Record that shard again."
            ) from error
        return cls(path, facts, index, ranks)

    def read(self, entry: int, max_scored: int) -> EncodedRecord:
        """The record of an entry of the index, verified."""
        start, length = int(self.index.offsets[entry]), int(self.index.lengths[entry])
        try:
            # Read, not mapped: a file that is cut while in use must not end in SIGBUS.
            with (self.path / DATA).open("rb", buffering=0) as file:
                record = unseal(os.pread(file.fileno(), length, start))
            if record.key != self.index.key(entry):
                raise DataError("the record is another sample's")
            if record.num_scored > max_scored:
                raise DataError(f"the record claims to have {record.num_scored:,} positions")
        except (DataError, OSError) as error:
            raise_if_too_many_open(error)
            raise DataError(
                f"{self.path / DATA}, byte {start:,}, sample {self.index.key(entry).hex()}: "
                f"{error}. `limbeck store repair` names what to record again."
            ) from error
        return record


def check_size(path: Path, size_bytes: int) -> None:
    """Require a regular file of this size."""
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        raise DataError(f"{path.name} must be a file, and is a link")
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{path.name} must be a regular file")
    if facts.st_size != size_bytes:
        raise DataError(f"{path.name} must have {size_bytes:,} bytes, and has {facts.st_size:,}")


def verified_bytes(path: Path, size_bytes: int, sha256: str) -> bytes:
    """The content of a file that has the size and the hash of its manifest."""
    check_size(path, size_bytes)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise DataError(f"{path.name} is not what was written (sha256 {digest[:12]}...)")
    return content
