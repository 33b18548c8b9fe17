"""A complete store, open for reading by sample key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.errors import DataError
from limbeck.losses import Head
from limbeck.losses.distributions import TeacherDistribution
from limbeck.store import hidden_states
from limbeck.store.head import read_head
from limbeck.store.header import StoreHeader, read_header
from limbeck.store.shard import DATA, Shard, finished_shards

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Record:
    """The decoded record of one sample.

    Attributes:
        signal: The teacher's distributions at the N scored positions.
        layers: Hidden states of the requested layers.
    """

    num_scored: int
    signal: TeacherDistribution
    layers: Mapping[int, Float[Tensor, "N D"]]


class Store:
    """A read-only store; safe to use from several threads and processes, and after a fork."""

    def __init__(self, path: Path, header: StoreHeader, shards: Sequence[Shard]) -> None:
        self.path = path
        self.header = header
        self._shards = tuple(shards)
        form = header.make_form()
        self.head: Head | None = read_head(path) if form.needs_head else None
        self._form = form if self.head is None else form.with_head(self.head)
        empty = [np.empty(0, dtype=np.uint64)]
        high = np.concatenate([*empty, *(shard.index.high for shard in shards)])
        low = np.concatenate([*empty, *(shard.index.low for shard in shards)])
        # If several shards have a sample, the first one is read.
        order = np.lexsort((np.arange(len(high)), low, high))
        self._high, self._low = high[order], low[order]
        ends = np.cumsum([0, *(len(shard.index) for shard in shards)])
        self._shard_of = (np.searchsorted(ends, order, side="right") - 1).astype(np.uint32)
        self._entry_of = (order - ends[self._shard_of]).astype(np.uint32)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a complete store.

        Raises:
            DataError: It is not a store, or a shard is absent or damaged.
            StorageError: The process has too many open files.
        """
        header = read_header(path)
        present = finished_shards(path, header)
        if missing := sorted(set(range(header.num_shards)) - set(present)):
            few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DataError(
                f"The store {path} must have {header.num_shards} shards, and {len(missing)} are "
                f"missing or damaged: {few}. Finish the recording, or merge its other parts."
            )
        return cls(path, header, [Shard.open(path, shard, header) for shard in present])

    @property
    def num_scored(self) -> int:
        """Number of positions with a signal."""
        return sum(shard.facts.scored for shard in self._shards)

    @property
    def record_bytes(self) -> int:
        """Total size of all records."""
        return sum(shard.facts.record_bytes for shard in self._shards)

    def keys(self) -> Iterator[bytes]:
        """Keys of the distinct samples, in ascending order."""
        before = b""
        for high, low in zip(self._high, self._low, strict=True):
            key = np.array([high, low], dtype=">u8").tobytes()
            if key != before:
                yield key
            before = key

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def read(self, key: bytes, layers: Collection[int] | None = None) -> Record:
        """The record of a sample, on the CPU.

        Args:
            layers: Recorded layers to decode; all of them by default.

        Raises:
            DataError: The store has no such sample, or its record is damaged.
        """
        position = self._find(key)
        if position is None:
            raise DataError(
                f"The store {self.path} has no sample {key.hex()}: the text, its tokens, its cut "
                "or which of its positions are scored differ from what was recorded. Record this "
                "data, or use the data the store names."
            )
        shard = self._shards[int(self._shard_of[position])]
        record = shard.read(int(self._entry_of[position]), self.header.sequence_length)
        try:
            if len(record.layers) != len(self.header.layers):
                raise DataError(f"the record has {len(record.layers)} layers")
            signal = self._form.decode(record.signal, record.num_scored, shard.ranks)
            outputs = {
                layer: hidden_states.decode(coded, record.num_scored)
                for layer, coded in zip(self.header.layers, record.layers, strict=True)
                if layers is None or layer in layers
            }
        except DataError as error:
            raise DataError(f"{shard.path / DATA}, sample {key.hex()}: {error}") from error
        return Record(record.num_scored, signal, outputs)

    def distribution(self, keys: Sequence[bytes]) -> TeacherDistribution:
        """The concatenated distributions of one or more samples."""
        return self.join([self.read(key) for key in keys])

    def join(self, records: Sequence[Record], device: torch.device = CPU) -> TeacherDistribution:
        """The concatenated distributions of records, on a device."""
        signals = [record.signal for record in records]
        return type(signals[0]).cat(signals).to(device)

    def _find(self, key: bytes) -> int | None:
        high, low = (int(half) for half in np.frombuffer(key, ">u8"))
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < len(self._high) and int(self._high[at]) == high:
            if int(self._low[at]) == low:
                return at
            at += 1
        return None
