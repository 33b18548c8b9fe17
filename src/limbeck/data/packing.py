"""Cutting texts into windows, and packing windows into rows: pure plans over lengths."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64


def cut(num_tokens: int, sequence_length: int) -> list[tuple[int, int]]:
    """Windows of a text as (first token, positions), none longer than `sequence_length`.

    A window of n positions reads n + 1 tokens, and its last token is the next window's first, so
    that each token but the text's first is a target exactly once.

    Example:
        >>> cut(8, 3)
        [(0, 3), (3, 3), (6, 1)]
    """
    positions = num_tokens - 1
    return [
        (start, min(sequence_length, positions - start))
        for start in range(0, positions, sequence_length)
    ]


def pack(
    lengths: Sequence[int] | Int64[np.ndarray, " windows"], capacity: int
) -> tuple[Int64[np.ndarray, " windows"], Int64[np.ndarray, " rows"]]:
    """The windows of the first row, of the second, and so on; and where each row ends among them.

    Few rows hold all windows: best fit, longest first. Each window goes into the fullest row that
    still has room. Deterministic. Rows stand in the order of their first window, and the windows of
    a row in their own, so that neighbours in the data stay near each other. n windows cost n log n
    for the sort, and n steps of `capacity` bits.

    Example:
        >>> pack([4, 3, 2, 1], 5)
        (array([0, 3, 1, 2]), array([2, 4]))
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    firsts = array("q")  # of each row
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have left
    rooms = 0  # bit r: some row has exactly r positions left
    for window in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable"):
        length = int(lengths[window])
        assert 0 < length <= capacity
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            firsts[row] = min(firsts[row], window)
        else:
            room, row = capacity, len(firsts)
            firsts.append(window)
        row_of[window] = row
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    first_of = np.array(firsts, dtype=np.int64)[row_of]  # of each window's row: this names the row
    windows = np.argsort(first_of, kind="stable")
    return windows, np.cumsum(np.unique(first_of, return_counts=True)[1])
