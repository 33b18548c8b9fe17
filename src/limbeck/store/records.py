"""The bytes of one record: a checksum, the sample's key, and the encoded sections.

    8 bytes    xxh3-64 of everything that follows
    16 bytes   key of the sample
    4 bytes    N, the number of scored positions
    4 bytes    number of sections: the distribution, then each layer in the header's order
    sections:  4 bytes of length each, and the bytes

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
MAX_SECTIONS = 4096


@dataclass(frozen=True)
class EncodedRecord:
    """A record whose checksum matches; nothing is decoded yet.

    Attributes:
        layers: The encoded hidden states of each recorded layer.
    """

    key: bytes
    num_scored: int
    signal: memoryview
    layers: tuple[memoryview, ...]


def seal(key: bytes, num_scored: int, sections: Sequence[bytes]) -> bytes:
    """A record's bytes."""
    fields = [START.pack(key, num_scored, len(sections))]
    for section in sections:
        fields += [LENGTH.pack(len(section)), section]
    body = b"".join(fields)
    return SUM.pack(xxhash.xxh3_64_intdigest(body)) + body


def unseal(record: bytes | memoryview) -> EncodedRecord:
    """A record, verified."""
    whole = memoryview(record)
    if len(whole) < SUM.size + START.size:
        raise DataError(f"the record has {len(whole)} bytes, too few for its own header")
    (digest,) = SUM.unpack(whole[: SUM.size])
    body = whole[SUM.size :]
    if xxhash.xxh3_64_intdigest(body) != digest:
        raise DataError("the record's checksum does not match its bytes")
    key, num_scored, num_sections = START.unpack(body[: START.size])
    if not 1 <= num_sections <= MAX_SECTIONS:
        raise DataError(f"the record claims to have {num_sections:,} sections")
    end, sections = START.size, []
    for _ in range(num_sections):
        if end + LENGTH.size > len(body):
            raise DataError("the record ends before its last section")
        (length,) = LENGTH.unpack(body[end : end + LENGTH.size])
        end += LENGTH.size + length
        if end > len(body):
            raise DataError(f"a section of {length:,} bytes reaches beyond the record")
        sections.append(body[end - length : end])
    if end != len(body):
        raise DataError(f"the record has {len(body) - end:,} bytes after its last section")
    return EncodedRecord(key, num_scored, sections[0], tuple(sections[1:]))
