"""A whole store, open for reading: any sample's signal in one look-up."""

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
from limbeck.store import states
from limbeck.store.head import read_head
from limbeck.store.header import StoreHeader, read_header
from limbeck.store.shard import DATA, Shard, finished_shards

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Record:
    """What a store holds of one sample.

    Attributes:
        num_scored: N.
        signal: The distribution at the N positions.
        layers: Outputs of each recorded layer that was asked for.
    """

    num_scored: int
    signal: TeacherDistribution
    layers: Mapping[int, Float[Tensor, "N D"]]


class Store:
    """A store, read-only. Several processes may read it at once; each opens it by itself."""

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
        # Of a sample that several shards hold, the first one's record is read.
        order = np.lexsort((np.arange(len(high)), low, high))
        self._high, self._low = high[order], low[order]
        ends = np.cumsum([0, *(len(shard.index) for shard in shards)])
        self._shard_of = (np.searchsorted(ends, order, side="right") - 1).astype(np.uint32)
        self._entry_of = (order - ends[self._shard_of]).astype(np.uint32)

    @classmethod
    def open(cls, path: Path) -> Store:
        """A store all of whose shards are there.

        Raises:
            DataError: It is not a store, or a shard is missing or damaged.
        """
        header = read_header(path)
        there = finished_shards(path, header)
        if missing := sorted(set(range(header.num_shards)) - set(there)):
            few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DataError(
                f"The store {path} must have {header.num_shards} shards, and {len(missing)} are "
                f"missing or damaged: {few}. Finish the recording, or merge its other parts."
            )
        return cls(path, header, [Shard.open(path, shard, header) for shard in there])

    @property
    def num_samples(self) -> int:
        """Different samples."""
        if not len(self._high):
            return 0
        new = (np.diff(self._high) != 0) | (np.diff(self._low) != 0)
        return 1 + int(new.sum())

    @property
    def num_scored(self) -> int:
        """Positions with a signal."""
        return sum(shard.facts.scored for shard in self._shards)

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return sum(shard.facts.record_bytes for shard in self._shards)

    def keys(self) -> Iterator[bytes]:
        """Keys of the samples, ascending."""
        before = b""
        for high, low in zip(self._high, self._low, strict=True):
            key = np.array([high, low], dtype=">u8").tobytes()
            if key != before:
                yield key
            before = key

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def read(self, key: bytes, layers: Collection[int] | None = None) -> Record:
        """What was recorded of a sample, on the CPU.

        Args:
            key: Of the sample.
            layers: Recorded layers to decode; all of them by default.

        Raises:
            DataError: The sample is not there, or its record is damaged.
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
                layer: states.decode(coded, record.num_scored)
                for layer, coded in zip(self.header.layers, record.layers, strict=True)
                if layers is None or layer in layers
            }
        except DataError as error:
            raise DataError(f"{shard.path / DATA}, sample {key.hex()}: {error}") from error
        return Record(record.num_scored, signal, outputs)

    def distribution(
        self, keys: Sequence[bytes], device: torch.device = CPU
    ) -> TeacherDistribution:
        """The distributions of several samples, one after the other; at least one sample."""
        return self.join([self.read(key) for key in keys], device)

    def join(self, found: Sequence[Record], device: torch.device = CPU) -> TeacherDistribution:
        """The distributions of records, one after the other, on a device."""
        signals = [record.signal for record in found]
        return type(signals[0]).cat(signals).to(device)

    def _find(self, key: bytes) -> int | None:
        high, low = (int(half) for half in np.frombuffer(key, ">u8"))
        at = int(np.searchsorted(self._high, np.uint64(high)))
        while at < len(self._high) and int(self._high[at]) == high:
            if int(self._low[at]) == low:
                return at
            at += 1
        return None
