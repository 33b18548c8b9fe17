"""Sets of different ids, a row each: sorted ranks, their gaps, and the gaps' bytes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

from limbeck.errors import DataError
from limbeck.store.planes import Unpacker, from_planes, num_bytes, to_planes
from limbeck.store.ranks import Ranks


def sort_by_rank(
    ids: Int[np.ndarray, "N k"], ranks: Ranks
) -> tuple[Int64[np.ndarray, "N k"], Int64[np.ndarray, "N k"]]:
    """Each row's ranks, ascending, and where in the row each was."""
    of_ids = ranks.of_ids[ids].astype(np.int64)
    order = np.argsort(of_ids, axis=-1)
    return np.take_along_axis(of_ids, order, -1), order


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


def write_uneven(
    ids: Int[np.ndarray, "N k"], there: Bool[np.ndarray, "N k"], ranks: Ranks, most: int
) -> tuple[list[UInt8[np.ndarray, " _"]], Int64[np.ndarray, "N k"]]:
    """Planes of rows with 1 to `most` ids each: how many less one, and the gaps; and the order.

    The order is where in its row each id was; those that are not there come last.
    """
    of_ids = np.where(there, ranks.of_ids[ids], ranks.vocabulary_size).astype(np.int64)
    order = np.argsort(of_ids, axis=-1, kind="stable")
    gaps = to_gaps(np.take_along_axis(of_ids, order, -1))
    there = np.take_along_axis(there, order, -1)
    planes = to_planes(there.sum(-1).astype(np.int64) - 1, most)
    return [*planes, *to_planes(gaps[there], ranks.vocabulary_size)], order


def read_uneven(
    unpack: Unpacker, num_rows: int, ranks: Ranks, most: int
) -> tuple[Int64[np.ndarray, "N k"], Bool[np.ndarray, "N k"]]:
    """Ids of uneven rows, and which are there; a row is filled with its first id.

    Raises:
        DataError: A row has more than `most`, or names no token.
    """
    lengths = from_planes([unpack.next(num_rows) for _ in range(num_bytes(most))]) + 1
    width = int(lengths.max(initial=1))
    if width > most:
        raise DataError(f"A position has {width:,} different tokens, more than {most:,}.")
    there = np.arange(width) < lengths[:, None]
    gaps = np.zeros((num_rows, width), dtype=np.int64)
    entries = int(lengths.sum())
    planes = [unpack.next(entries) for _ in range(num_bytes(ranks.vocabulary_size))]
    gaps[there] = from_planes(planes)
    places = (gaps + 1).cumsum(-1) - 1
    return ids_at(np.where(there, places, places[:, :1]), ranks), there
