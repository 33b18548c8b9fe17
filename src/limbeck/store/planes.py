"""Arrays of bytes on end, each compressed: what a coded signal is made of."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow
from jaxtyping import Int64, UInt8

from limbeck.errors import DataError

LEVEL = 3
"""Of zstd; level 19 saves 4 per cent at a thirtieth of the speed."""

MOST_PLANE_BYTES = 1 << 28
"""A larger plane is neither written nor read, whatever a file says."""


def pack(planes: Sequence[UInt8[np.ndarray, " _"]]) -> bytes:
    """Planes, each as the length of its zstd frame (4 bytes, little-endian) and the frame."""
    codec = pyarrow.Codec("zstd", compression_level=LEVEL)
    told = []
    for plane in planes:
        assert plane.size <= MOST_PLANE_BYTES
        frame = codec.compress(np.ascontiguousarray(plane).tobytes(), asbytes=True)
        told += [struct.pack("<I", len(frame)), frame]
    return b"".join(told)


class Unpacker:
    """Reads planes back, one after the other, into no more memory than each may take."""

    def __init__(self, packed: bytes | memoryview) -> None:
        self._packed = memoryview(packed)
        self._at = 0

    def next(self, size: int) -> UInt8[np.ndarray, " bytes"]:
        """The next plane, which must have `size` bytes.

        Raises:
            DataError: It has not, or is not there.
        """
        if size > MOST_PLANE_BYTES:
            raise DataError(f"A plane of {size:,} bytes is more than {MOST_PLANE_BYTES:,}.")
        start = self._at + 4
        if start > len(self._packed):
            raise DataError("A coded signal ends before its last plane.")
        (length,) = struct.unpack("<I", self._packed[self._at : start])
        self._at = start + length
        if self._at > len(self._packed):
            raise DataError(f"A plane of {length:,} bytes reaches beyond its coded signal.")
        frame = self._packed[start : self._at]
        try:
            # zstd is given `size` bytes to write to and fails where the frame holds more.
            plane = pyarrow.Codec("zstd").decompress(frame, size, asbytes=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"A plane of a coded signal cannot be decompressed: {error}."
            ) from error
        found = np.frombuffer(plane, np.uint8)
        if len(found) != size:
            raise DataError(f"A plane of a coded signal has {len(found):,} bytes, not {size:,}.")
        return found

    def finish(self) -> None:
        """Nothing must be left.

        Raises:
            DataError: There is.
        """
        if self._at != len(self._packed):
            left = len(self._packed) - self._at
            raise DataError(f"A coded signal goes on for {left:,} bytes after its last plane.")


def num_bytes(vocabulary_size: int) -> int:
    """Bytes that hold any id: 2 up to 65,536 ids, 3 up to 16.7 million."""
    return max(1, -(-(vocabulary_size - 1).bit_length() // 8))


def to_planes(
    gaps: Int64[np.ndarray, " entries"], vocabulary_size: int
) -> list[UInt8[np.ndarray, " entries"]]:
    """Byte planes of non-negative numbers below the vocabulary's size, lowest bytes first."""
    width = num_bytes(vocabulary_size)
    return [(gaps >> (8 * place) & 255).astype(np.uint8) for place in range(width)]


def from_planes(planes: list[UInt8[np.ndarray, " entries"]]) -> Int64[np.ndarray, " entries"]:
    """What `to_planes` was given."""
    gaps = planes[0].astype(np.int64)
    for place, plane in enumerate(planes[1:], start=1):
        gaps |= plane.astype(np.int64) << (8 * place)
    return gaps
