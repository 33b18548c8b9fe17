"""Where each record of a shard lies, by the key of its sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt32, UInt64

from limbeck.errors import DataError

ENTRY_BYTES = 32


@dataclass(frozen=True)
class Index:
    """Records of a shard in the order of their keys, as it stands in the file, column by column.

    Attributes:
        high: First 8 bytes of each key, as a big-endian number.
        low: Last 8 bytes.
        offsets: Where in the shard's Parquet file the record begins.
        lengths: Bytes of the record.
        rows: Its row in the Parquet file.
    """

    high: UInt64[np.ndarray, " n"]
    low: UInt64[np.ndarray, " n"]
    offsets: UInt64[np.ndarray, " n"]
    lengths: UInt32[np.ndarray, " n"]
    rows: UInt32[np.ndarray, " n"]

    @classmethod
    def make(cls, keys: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]) -> Index:
        """The index of records in the order of their rows."""
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
        """The columns, one after the other, little-endian."""
        columns = [self.high, self.low, self.offsets, self.lengths, self.rows]
        return b"".join(
            column.astype(column.dtype.newbyteorder("<")).tobytes() for column in columns
        )

    @classmethod
    def load(cls, path: Path, num_records: int, data_bytes: int) -> Index:
        """An index from its file, whose hash has been checked.

        Raises:
            DataError: It does not fit the shard.
        """
        told = np.memmap(path, np.uint8, mode="r") if num_records else np.empty(0, np.uint8)
        if len(told) != ENTRY_BYTES * num_records:
            raise DataError(
                f"{path} must have {ENTRY_BYTES} bytes for each of {num_records:,} records, and "
                f"has {len(told):,}."
            )
        ends = np.cumsum([8, 8, 8, 4, 4]) * num_records
        high, low, offsets, lengths, rows = np.split(told, ends[:-1])
        index = cls(
            high.view("<u8"),
            low.view("<u8"),
            offsets.view("<u8"),
            lengths.view("<u4"),
            rows.view("<u4"),
        )
        beyond = (index.offsets > data_bytes) | (index.lengths > data_bytes - index.offsets)
        if bool(beyond.any()):
            raise DataError(
                f"{path} names a record that lies beyond the shard's {data_bytes:,} bytes."
            )
        return index

    def __len__(self) -> int:
        return len(self.high)

    def key(self, place: int) -> bytes:
        """The key at a place of the index."""
        return np.array([self.high[place], self.low[place]], dtype=">u8").tobytes()
