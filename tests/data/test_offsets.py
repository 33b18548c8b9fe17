"""Bytes are counted once, whichever tokens a character was cut into."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data.offsets import covered_bytes
from tests.tokenizers.small import backend

TOKENIZER = backend()


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_all_tokens_cover_all_bytes(text: str) -> None:
    offsets = TOKENIZER.encode(text).offsets
    everything = np.ones(len(offsets), dtype=np.bool_)
    assert covered_bytes(text, offsets, everything) == len(text.encode())
    assert covered_bytes(text, offsets, ~everything) == 0


@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
    cut=st.integers(0, 40),
)
def test_a_cut_between_characters_splits_the_bytes(text: str, cut: int) -> None:
    offsets = TOKENIZER.encode(text).offsets
    first = np.arange(len(offsets)) < cut
    total = covered_bytes(text, offsets, first) + covered_bytes(text, offsets, ~first)
    # a character whose tokens fall on both sides counts on both
    assert len(text.encode()) <= total <= len(text.encode()) + 4


@pytest.mark.parametrize(
    ("text", "chosen", "size"),
    [
        ("a é", [(1, 3)], 3),
        ("日本", [(0, 1)], 3),
        ("🎉!", [(0, 1)], 4),
    ],
)
def test_characters_count_their_utf8_bytes(
    text: str, chosen: list[tuple[int, int]], size: int
) -> None:
    rest = [(chosen[0][1], len(text))] if chosen[0][1] < len(text) else []
    begin = [(0, chosen[0][0])] if chosen[0][0] else []
    offsets = [*begin, *chosen, *rest]
    mask = np.array([span in chosen for span in offsets])
    assert covered_bytes(text, offsets, mask) == size


def test_trimmed_spaces_belong_to_the_token_after_them() -> None:
    offsets = [(0, 1), (2, 3)]  # "a b " with the space trimmed away, and one at the end
    assert covered_bytes("a b ", offsets, np.array([False, True])) == 3
    assert covered_bytes("a b ", offsets, np.array([True, False])) == 1


def test_tokens_that_stand_for_no_text_have_no_bytes() -> None:
    assert covered_bytes("ab", [(0, 0), (0, 2), (0, 0)], np.array([True, False, True])) == 0
