"""Sets of different ids, a row each: sorted ranks, their gaps, and the gaps' bytes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int64, UInt8

from limbeck.errors import DataError
from limbeck.store.planes import Unpacker
from limbeck.store.ranks import Ranks


def num_bytes(vocabulary_size: int) -> int:
    """Bytes that hold any id: 2 up to 65,536 ids, 3 up to 16.7 million."""
    return max(1, -(-(vocabulary_size - 1).bit_length() // 8))


def sort_by_rank(
    ids: Int[np.ndarray, "N k"], ranks: Ranks
) -> tuple[Int64[np.ndarray, "N k"], Int64[np.ndarray, "N k"]]:
    """Each row's ranks, ascending, and where in the row each was."""
    of_ids = ranks.of_ids[ids].astype(np.int64)
    order = np.argsort(of_ids, axis=-1)
    return np.take_along_axis(of_ids, order, -1), order


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


def to_gaps(sorted_ranks: Int64[np.ndarray, "N k"]) -> Int64[np.ndarray, "N k"]:
    """The first rank of each row, then how many ranks lie between neighbours."""
    return np.asarray(np.diff(sorted_ranks, axis=-1, prepend=-1) - 1)


def from_gaps(gaps: Int64[np.ndarray, "N k"], ranks: Ranks) -> Int64[np.ndarray, "N k"]:
    """The ids whose ranks have these gaps.

    Raises:
        DataError: A rank lies beyond the vocabulary.
    """
    return ids_at((gaps + 1).cumsum(-1) - 1, ranks)


def ids_at(places: Int64[np.ndarray, "N k"], ranks: Ranks) -> Int64[np.ndarray, "N k"]:
    """The ids at these ranks.

    Raises:
        DataError: A rank lies beyond the vocabulary.
    """
    if places.size and int(places.max()) >= ranks.vocabulary_size:
        raise DataError(
            f"A coded signal names a token beyond the {ranks.vocabulary_size:,} of its vocabulary."
        )
    return np.asarray(ranks.ids[places], dtype=np.int64)


def read_rows(unpack: Unpacker, num_rows: int, k: int, ranks: Ranks) -> Int64[np.ndarray, "N k"]:
    """The ids of rows of k each, from their gaps' byte planes.

    Raises:
        DataError: They are not there, or name no token.
    """
    width = num_bytes(ranks.vocabulary_size)
    gaps = from_planes([unpack.next(num_rows * k) for _ in range(width)])
    return from_gaps(gaps.reshape(num_rows, k), ranks)
