"""One published shard: a Parquet file, an index into it, and what its codec learnt."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import DataError
from limbeck.files import sealed_manifest
from limbeck.store.header import StoreHeader
from limbeck.store.index import Index
from limbeck.store.ranks import Ranks
from limbeck.store.records import Parts, unseal

DATA, INDEX, RANKS = "data.parquet", "index.bin", "ranks.bin"


def shard_name(shard: int) -> str:
    """A shard's folder in its store."""
    return f"shard-{shard:05d}"


def shard_facts(folder: Path, shard: int) -> dict[str, Any] | None:
    """What a published shard's manifest says; None without one that is whole.

    Whether the shard's own files are whole is not looked at.
    """
    return sealed_manifest(folder / shard_name(shard))


def finished_shards(folder: Path, header: StoreHeader) -> list[int]:
    """Shards that are published; whether their records are whole is not looked at."""
    every = range(header.num_shards)
    return [shard for shard in every if shard_facts(folder, shard) is not None]


@dataclass(frozen=True)
class Shard:
    """A shard, open for reading; no record has been read yet.

    Attributes:
        path: Its folder.
        facts: What its manifest says.
        index: Where each record lies.
        ranks: What its codec learnt.
        data: The Parquet file, memory-mapped.
    """

    path: Path
    facts: dict[str, Any]
    index: Index
    ranks: Ranks
    data: mmap.mmap | bytes

    @classmethod
    def open(cls, folder: Path, shard: int, header: StoreHeader) -> Shard:
        """A shard of a store: manifest, sizes, index and ranks are checked, records when read.

        Raises:
            DataError: It is not there, damaged, or belongs to another store.
        """
        path, facts = folder / shard_name(shard), shard_facts(folder, shard)
        if facts is None:
            raise DataError(
                f"Shard {shard} of {folder} must be there and whole, but {path} has no valid "
                "manifest. Record that shard again."
            )
        try:
            if facts["header"] != header.sha256 or facts["shard"] != shard:
                raise DataError("it belongs to another recording")
            samples = int(facts["samples"])
            for name in (DATA, INDEX, RANKS):
                check_size(path / name, facts["files"][name][0])
            for name in (INDEX, RANKS):
                check_hash(path / name, facts["files"][name][1])
            size = (path / DATA).stat().st_size
            index = Index.load(path / INDEX, samples, size)
            ranks = Ranks.from_bytes((path / RANKS).read_bytes(), header.vocabulary_size)
            with (path / DATA).open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (DataError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"Shard {shard} of {folder} cannot be used: {error}. Record that shard again."
            ) from error
        return cls(path, facts, index, ranks, data)

    def read(self, place: int, most_scored: int) -> Parts:
        """The record at a place of the index, checked.

        Raises:
            DataError: It is damaged, or is another sample's; the file and the byte are named.
        """
        start, length = int(self.index.offsets[place]), int(self.index.lengths[place])
        try:
            parts = unseal(self.data[start : start + length])
            if parts.key != self.index.key(place):
                raise DataError("the record is another sample's")
            if parts.num_scored > most_scored:
                raise DataError(f"the record says it has {parts.num_scored:,} positions")
        except DataError as error:
            raise DataError(
                f"{self.path / DATA}, byte {start:,}, sample {self.index.key(place).hex()}: "
                f"{error}. `limbeck store repair` says what to record again."
            ) from error
        return parts


def check_size(path: Path, wanted: int) -> None:
    """A file must have the bytes its manifest says, and be no link.

    Raises:
        DataError: It has not.
    """
    if path.is_symlink():
        raise DataError(f"{path.name} must be a file, and is a link")
    if (found := path.stat().st_size) != wanted:
        raise DataError(f"{path.name} must have {wanted:,} bytes, and has {found:,}")


def check_hash(path: Path, wanted: str) -> None:
    """A file must have the hash its manifest says.

    Raises:
        DataError: It has not.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise DataError(f"{path.name} is not what was written (sha256 {found[:12]}...)")
