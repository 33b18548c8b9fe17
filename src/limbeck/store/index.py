"""The index of a shard: where in its Parquet file the record of each sample is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt32, UInt64

from limbeck.errors import DataError

ENTRY_BYTES = 32


@dataclass(frozen=True)
class Index:
    """The records of a shard, sorted by key; one array a column, as in the file.

    Attributes:
        high: First 8 bytes of each key, as a big-endian number.
        offsets: Byte offset of the record in the shard's Parquet file.
    """

    high: UInt64[np.ndarray, " n"]
    low: UInt64[np.ndarray, " n"]
    offsets: UInt64[np.ndarray, " n"]
    lengths: UInt32[np.ndarray, " n"]
    rows: UInt32[np.ndarray, " n"]

    @classmethod
    def make(cls, keys: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]) -> Index:
        """The index of records that are listed in the order of their rows."""
        halves = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        return cls(
            halves[order, 0],
            halves[order, 1],
            np.asarray(offsets, dtype=np.uint64)[order],
            np.asarray(lengths, dtype=np.uint32)[order],
            order.astype(np.uint32),
        )

    def to_bytes(self) -> bytes:
        """The columns one after the other, little-endian."""
        columns = [self.high, self.low, self.offsets, self.lengths, self.rows]
        return b"".join(
            column.astype(column.dtype.newbyteorder("<")).tobytes() for column in columns
        )

    @classmethod
    def from_bytes(cls, content: bytes, num_records: int, data_bytes: int) -> Index:
        """The index that `to_bytes` wrote, for a Parquet file of `data_bytes`."""
        if len(content) != ENTRY_BYTES * num_records:
            raise DataError(
                f"the index must have {ENTRY_BYTES} bytes for each of {num_records:,} records, "
                f"and has {len(content):,}"
            )
        ends = np.cumsum([8, 8, 8, 4, 4]) * num_records
        columns = np.split(np.frombuffer(content, np.uint8), ends[:-1])
        types = ("<u8", "<u8", "<u8", "<u4", "<u4")
        index = cls(*(part.view(kind) for part, kind in zip(columns, types, strict=True)))
        outside = (index.offsets > data_bytes) | (index.lengths > data_bytes - index.offsets)
        if bool(outside.any()):
            raise DataError(
                f"the index names a record that lies beyond the shard's {data_bytes:,} bytes"
            )
        if not np.array_equal(np.sort(index.rows), np.arange(num_records)):
            raise DataError(f"the index must name each of {num_records:,} rows once")
        return index

    def __len__(self) -> int:
        return len(self.high)

    def key(self, entry: int) -> bytes:
        """The key of an entry."""
        return np.array([self.high[entry], self.low[entry]], dtype=">u8").tobytes()
