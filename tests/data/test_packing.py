"""Cutting and packing lose nothing, overlap nothing, and fill rows well."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data.packing import cut, pack

CAPACITY = 24


def packed(lengths, capacity: int) -> list[list[int]]:
    """Windows of each row."""
    windows, ends = pack(lengths, capacity)
    return [part.tolist() for part in np.split(windows, ends[:-1])] if len(ends) else []


LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


@given(num_tokens=st.integers(0, 300), length=st.integers(2, 40))
def test_every_token_but_the_first_is_a_target_exactly_once(num_tokens: int, length: int) -> None:
    windows = cut(num_tokens, length)
    targets = [start + 1 + p for start, positions in windows for p in range(positions)]
    assert targets == list(range(1, num_tokens))
    assert all(1 <= positions <= length for _, positions in windows)


@given(lengths=LENGTHS)
def test_every_window_is_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    rows = packed(lengths, CAPACITY)
    assert sorted(w for row in rows for w in row) == list(range(len(lengths)))
    assert all(sum(lengths[w] for w in row) <= CAPACITY for row in rows)


@given(lengths=LENGTHS)
def test_packing_is_never_worse_than_half_above_the_least_possible(lengths: list[int]) -> None:
    # A window of at most a third of a row opens one only when all others are two thirds full, and
    # longer ones pair up. The least possible is at least the sum, and one row a window over a half.
    big = sum(length > CAPACITY // 2 for length in lengths)
    least = max(-(-sum(lengths) // CAPACITY), big)
    assert least <= len(packed(lengths, CAPACITY)) <= 1.5 * least + 1


@given(lengths=LENGTHS)
def test_no_two_rows_fit_into_one(lengths: list[int]) -> None:
    filled = sorted(sum(lengths[w] for w in row) for row in packed(lengths, CAPACITY))
    assert len(filled) < 2 or filled[0] + filled[1] > CAPACITY


def test_rows_keep_the_order_of_the_data() -> None:
    rows = packed([5, 24, 3, 24, 16], CAPACITY)
    assert rows == [[0, 2, 4], [1], [3]]


def test_many_windows_pack_in_seconds_and_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 200_000)
    started = time.process_time()
    _, rows = pack(lengths, 1024)
    assert time.process_time() - started < 20
    assert lengths.sum() / (1024 * len(rows)) > 0.99


def test_a_window_longer_than_a_row_is_an_internal_error() -> None:
    with pytest.raises(AssertionError):
        pack([CAPACITY + 1], CAPACITY)
