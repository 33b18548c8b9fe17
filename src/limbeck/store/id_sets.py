"""Rows of distinct token ids, encoded as the gaps between their sorted ranks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

from limbeck.errors import DataError
from limbeck.store.byte_planes import Unpacker, from_planes, num_bytes, to_planes
from limbeck.store.token_ranks import TokenRanks


def sort_by_rank(
    ids: Int[np.ndarray, "N k"], ranks: TokenRanks
) -> tuple[Int64[np.ndarray, "N k"], Int64[np.ndarray, "N k"]]:
    """Each row's ranks in ascending order, and the permutation that sorts them."""
    of_ids = ranks.of_ids[ids].astype(np.int64)
    order = np.argsort(of_ids, axis=-1)
    return np.take_along_axis(of_ids, order, -1), order


def to_gaps(sorted_ranks: Int64[np.ndarray, "N k"]) -> Int64[np.ndarray, "N k"]:
    """The first rank of each row, then the number of ranks between neighbours."""
    return np.asarray(np.diff(sorted_ranks, axis=-1, prepend=-1) - 1)


def ids_at(positions: Int64[np.ndarray, "N k"], ranks: TokenRanks) -> Int64[np.ndarray, "N k"]:
    """The ids at these ranks."""
    if positions.size and int(positions.max()) >= ranks.vocabulary_size:
        raise DataError(
            f"A coded signal names a token beyond the {ranks.vocabulary_size:,} of its vocabulary."
        )
    return np.asarray(ranks.ids[positions], dtype=np.int64)


def read_rows(
    unpack: Unpacker, num_rows: int, k: int, ranks: TokenRanks
) -> Int64[np.ndarray, "N k"]:
    """The ids of rows of k ids each."""
    width = num_bytes(ranks.vocabulary_size)
    gaps = from_planes([unpack.next(num_rows * k) for _ in range(width)])
    return ids_at((gaps.reshape(num_rows, k) + 1).cumsum(-1) - 1, ranks)


def write_uneven(
    ids: Int[np.ndarray, "N k"], present: Bool[np.ndarray, "N k"], ranks: TokenRanks, max_ids: int
) -> tuple[list[UInt8[np.ndarray, " _"]], Int64[np.ndarray, "N k"]]:
    """Byte planes of rows with 1 to `max_ids` ids each, and the permutation that sorts each row.

    The planes are the number of ids less one, then the gaps. Absent ids come last.
    """
    of_ids = np.where(present, ranks.of_ids[ids], ranks.vocabulary_size).astype(np.int64)
    order = np.argsort(of_ids, axis=-1, kind="stable")
    gaps = to_gaps(np.take_along_axis(of_ids, order, -1))
    present = np.take_along_axis(present, order, -1)
    planes = to_planes(present.sum(-1).astype(np.int64) - 1, max_ids)
    return [*planes, *to_planes(gaps[present], ranks.vocabulary_size)], order


def read_uneven(
    unpack: Unpacker, num_rows: int, ranks: TokenRanks, max_ids: int
) -> tuple[Int64[np.ndarray, "N k"], Bool[np.ndarray, "N k"]]:
    """Ids of uneven rows, and which are present; a row is padded with its first id."""
    lengths = from_planes([unpack.next(num_rows) for _ in range(num_bytes(max_ids))]) + 1
    width = int(lengths.max(initial=1))
    if width > max_ids:
        raise DataError(f"A position has {width:,} different tokens, more than {max_ids:,}.")
    present = np.arange(width) < lengths[:, None]
    gaps = np.zeros((num_rows, width), dtype=np.int64)
    entries = int(lengths.sum())
    planes = [unpack.next(entries) for _ in range(num_bytes(ranks.vocabulary_size))]
    gaps[present] = from_planes(planes)
    positions = (gaps + 1).cumsum(-1) - 1
    return ids_at(np.where(present, positions, positions[:, :1]), ranks), present
