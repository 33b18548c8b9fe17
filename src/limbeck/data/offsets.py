"""The bytes of the text that each token covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool


def covered_bytes(
    text: str, offsets: Sequence[tuple[int, int]], chosen: Bool[np.ndarray, " tokens"]
) -> int:
    """UTF-8 bytes of the characters that the chosen tokens cover.

    A character between two tokens (a tokenizer may trim or drop spaces) belongs to the token after
    it, one after the last token to the last, and a character cut into several tokens counts once,
    when any of them is chosen. Choosing all gives the bytes of the whole text.

    Args:
        offsets: Of each token, its first character and one past its last; both 0 for a token that
            stands for no text.
    """
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    real = spans[:, 1] > spans[:, 0]
    spans, chosen = spans[real], chosen[real]
    if not len(spans):
        return 0
    ends = np.maximum.accumulate(spans[:, 1])
    ends[-1] = len(text)
    starts = np.minimum(spans[:, 0], np.concatenate([[0], ends[:-1]]))
    edges = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(edges, starts[chosen], 1)
    np.add.at(edges, ends[chosen], -1)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    return int(sizes[np.cumsum(edges)[:-1] > 0].sum())
