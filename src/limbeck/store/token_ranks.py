"""Token ids ranked by frequency in a shard, so that most encoded numbers are small."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from limbeck.errors import DataError
from limbeck.store.byte_planes import Unpacker, from_planes, num_bytes, pack, to_planes

COUNT = struct.Struct("<I")

COUNTED_TOKENS = 4096
"""The ranking of a shard is counted on this many scored tokens, its first ones."""


@dataclass(frozen=True)
class TokenRanks:
    """A bijection of token ids and ranks: the frequent ids first, then all others in order.

    Attributes:
        frequent: Ids that were counted, the most frequent first.
        vocabulary_size: Number of token ids.
    """

    frequent: Int32[np.ndarray, " seen"]
    vocabulary_size: int

    @classmethod
    def from_ids(cls, ids: Sequence[Int[np.ndarray, " _"]], vocabulary_size: int) -> TokenRanks:
        """The ranking by count in these ids; ties are broken by the smaller id."""
        counts = np.bincount(np.concatenate([*ids, []]).astype(np.int64), minlength=vocabulary_size)
        order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
        return cls(order.astype(np.int32), vocabulary_size)

    @classmethod
    def from_bytes(cls, content: bytes, vocabulary_size: int) -> TokenRanks:
        """The ranking that `to_bytes` wrote."""
        if len(content) < COUNT.size:
            raise DataError(f"A table of ranks cannot have {len(content)} bytes.")
        (seen,) = COUNT.unpack_from(content)
        if seen > vocabulary_size:
            raise DataError(f"A table ranks {seen:,} tokens of {vocabulary_size:,}.")
        unpack = Unpacker(memoryview(content)[COUNT.size :])
        planes = [unpack.next(seen) for _ in range(num_bytes(vocabulary_size))]
        unpack.finish()
        frequent = from_planes(planes).astype(np.int32)
        inside = bool(((frequent >= 0) & (frequent < vocabulary_size)).all())
        if not inside or len(np.unique(frequent)) != len(frequent):
            raise DataError("A table of ranks must hold different ids of the vocabulary.")
        return cls(frequent, vocabulary_size)

    def to_bytes(self) -> bytes:
        """The number of frequent ids in 4 bytes, then their byte planes."""
        planes = to_planes(self.frequent.astype(np.int64), self.vocabulary_size)
        return COUNT.pack(len(self.frequent)) + pack(planes)

    @functools.cached_property
    def ids(self) -> Int32[np.ndarray, " V"]:
        """The id at each rank."""
        rare = np.ones(self.vocabulary_size, dtype=np.bool_)
        rare[self.frequent] = False
        return np.concatenate([self.frequent, np.flatnonzero(rare).astype(np.int32)])

    @functools.cached_property
    def of_ids(self) -> Int32[np.ndarray, " V"]:
        """The rank of each id."""
        ranks = np.empty(self.vocabulary_size, dtype=np.int32)
        ranks[self.ids] = np.arange(self.vocabulary_size, dtype=np.int32)
        return ranks
