"""The bytes of one record: a checksum, the sample's key, and the coded parts.

    8 bytes    xxh3-64 of all that follows
    16 bytes   key of the sample
    4 bytes    N, its scored positions
    4 bytes    number of parts: the distribution's, then each layer's in the header's order
    each part: 4 bytes of length, and the bytes

All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from limbeck.errors import DataError

SUM = struct.Struct("<Q")
START = struct.Struct("<16sII")
LENGTH = struct.Struct("<I")
MOST_PARTS = 4096


@dataclass(frozen=True)
class Parts:
    """A record that is what was written.

    Attributes:
        key: Of the sample.
        num_scored: N.
        signal: The coded distribution.
        layers: The coded outputs of each recorded layer.
    """

    key: bytes
    num_scored: int
    signal: memoryview
    layers: tuple[memoryview, ...]


def seal(key: bytes, num_scored: int, parts: Sequence[bytes]) -> bytes:
    """A record's bytes."""
    told = [START.pack(key, num_scored, len(parts))]
    for part in parts:
        told += [LENGTH.pack(len(part)), part]
    body = b"".join(told)
    return SUM.pack(xxhash.xxh3_64_intdigest(body)) + body


def unseal(record: bytes | memoryview) -> Parts:
    """A record, checked.

    Raises:
        DataError: Its checksum does not match, or its parts do not fill it.
    """
    whole = memoryview(record)
    if len(whole) < SUM.size + START.size:
        raise DataError(f"the record has {len(whole)} bytes, too few for its own head")
    (wanted,) = SUM.unpack(whole[: SUM.size])
    body = whole[SUM.size :]
    if xxhash.xxh3_64_intdigest(body) != wanted:
        raise DataError("the record's checksum does not match its bytes")
    key, num_scored, num_parts = START.unpack(body[: START.size])
    if not 1 <= num_parts <= MOST_PARTS:
        raise DataError(f"the record says it has {num_parts:,} parts")
    at, parts = START.size, []
    for _ in range(num_parts):
        if at + LENGTH.size > len(body):
            raise DataError("the record ends before its last part")
        (length,) = LENGTH.unpack(body[at : at + LENGTH.size])
        at += LENGTH.size + length
        if at > len(body):
            raise DataError(f"a part of {length:,} bytes reaches beyond the record")
        parts.append(body[at - length : at])
    if at != len(body):
        raise DataError(f"the record goes on for {len(body) - at:,} bytes after its last part")
    return Parts(key, num_scored, parts[0], tuple(parts[1:]))
