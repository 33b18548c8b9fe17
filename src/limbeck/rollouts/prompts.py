"""Prompts taken from the documents of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from jaxtyping import Int64

from limbeck.data import TextData


class Prompts(Sequence[Sequence[int]]):
    """Prompts: the first tokens of documents, read from disk.

    Attributes:
        too_short: Number of documents without a token after the prompt.
        too_long: Number of documents whose prompt is longer than `longest`.
    """

    def __init__(
        self,
        data: TextData,
        *,
        longest: int,
        first_tokens: int = 0,
        documents: Int64[np.ndarray, " chosen"] | None = None,
    ) -> None:
        """
        Args:
            first_tokens: Length of a prompt of `text` data. Other data have prompts of their own,
                all before the last run of scored tokens: a chat up to its last answer, with the
                template's generation prompt, or the prompt of a completion.
            documents: Take prompts of these documents only; all by default.
        """
        ends = np.asarray(data.document_ends)
        begins = np.concatenate([[0], ends[:-1]])
        is_text = data.facts["type"] == "text"
        stops = begins + first_tokens if is_text else last_answers(data, ends)
        has_prompt = (begins < stops) & (stops < ends)
        if documents is not None:
            has_prompt &= np.isin(np.arange(len(ends)), documents)
        fits = stops - begins <= longest
        self.too_short = int(np.count_nonzero(~has_prompt))
        self.too_long = int(np.count_nonzero(has_prompt & ~fits))
        kept = has_prompt & fits
        self._tokens = data.tokens
        self._spans = np.stack([begins[kept], stops[kept]], axis=1)
        self._ends = ends[kept]

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        begin, stop = self._spans[index].tolist()
        ids: list[int] = self._tokens[begin:stop].tolist()
        return ids

    def following(self, index: int, most: int) -> list[int]:
        """The tokens after a prompt in its own document, at most so many."""
        stop = int(self._spans[index, 1])
        ids: list[int] = self._tokens[stop : min(stop + most, int(self._ends[index]))].tolist()
        return ids

    @property
    def mean_length(self) -> float:
        """Tokens of a prompt, on average."""
        return float((self._spans[:, 1] - self._spans[:, 0]).mean())


def last_answers(
    data: TextData, ends: Int64[np.ndarray, " documents"]
) -> Int64[np.ndarray, " documents"]:
    """Index of the first token of the last run of scored tokens in each document.

    A document's first token is never scored, so a run lies in one document. For a document
    without scored tokens it is an index before the document, or -1.
    """
    scored = np.asarray(data.scored)
    starts = np.concatenate([[-1], np.flatnonzero(scored[1:] & ~scored[:-1]) + 1])
    return np.asarray(starts[np.searchsorted(starts, ends) - 1])
