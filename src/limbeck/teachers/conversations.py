"""Windows of conversations, aligned with the teacher's own rendering of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int, Int32, Int64, UInt64

from limbeck.data import TextData
from limbeck.data.formats.chat import end_of_answer
from limbeck.errors import ConfigError, DataError
from limbeck.models import PreTrainedTokenizerBase
from limbeck.teachers.base import TextWindows
from limbeck.tokenizers import (
    Aligner,
    Alignment,
    Rendering,
    TokenBytes,
    align_conversation,
    window_of,
)

Ends = tuple[int | None, int | None]
"""Tokens of student and teacher that end a text."""


class Indexed(NamedTuple):
    """Windows of conversations by content.

    Attributes:
        keys: Hashes of their tokens, ascending.
        windows: Their indices in `ours.windows`.
        ours: The text in the student's tokens.
        theirs: The same documents, whole, in the teacher's tokens.
        their_documents: Of each document of `ours` that in `theirs`, or -1.
    """

    keys: UInt64[np.ndarray, " n"]
    windows: Int64[np.ndarray, " n"]
    ours: TextData
    theirs: TextData
    their_documents: Int64[np.ndarray, " documents"]


class ConversationAligner(Aligner):
    """Aligns windows of known conversations by their answers, and other text byte by byte."""

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        max_teacher_tokens: int | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """
        Args:
            tokenizer: The teacher's; its chat template writes conversations for the teacher.
        """
        super().__init__(student, teacher, max_teacher_tokens)
        self._tokenizer = tokenizer
        self._texts: list[Indexed] = []

    def add(self, text: TextWindows) -> None:
        """Read the conversations of a text again, in the teacher's tokens.

        Raises:
            DataError: The teacher's chat template refuses a conversation.
        """
        data = text.data
        is_conversation = data.is_conversation
        if not is_conversation.any():
            return
        chosen = [w for w in text.windows if is_conversation[data.windows[w, 2]]]
        keys = np.array([key_of(tokens_of(data, w)) for w in chosen], dtype=np.uint64)
        order = np.argsort(keys)
        try:
            theirs = data.whole_in(self._tokenizer)
        except DataError as error:
            problem = f"{text.option}, in the teacher's chat template: {error}"
            raise DataError(problem) from error
        windows = np.array(chosen, dtype=np.int64)[order]
        self._texts.append(Indexed(keys[order], windows, data, theirs, matched(data, theirs)))

    def align(self, stretches: Sequence[Sequence[int]]) -> list[Alignment | str]:
        found = [self._known(np.array(ids, dtype=np.int64)) for ids in stretches]
        others = [ids for ids, own in zip(stretches, found, strict=True) if own is None]
        rest = iter(super().align(others))
        return [next(rest) if own is None else own for own in found]

    def _known(self, ids: Int64[np.ndarray, " t"]) -> Alignment | str | None:
        key = key_of(ids)
        for text in self._texts:
            place = int(np.searchsorted(text.keys, key))
            if place < len(text.keys) and text.keys[place] == key:
                window = int(text.windows[place])
                if np.array_equal(tokens_of(text.ours, window), ids):
                    return self._aligned(text, window)
        return None

    def _aligned(self, text: Indexed, window: int) -> Alignment | str:
        start, length, document = text.ours.windows[window].tolist()
        other = int(text.their_documents[document])
        if other < 0:
            return "the teacher's chat template cannot write it"
        first, ours = rendering(text.ours, document)
        _, theirs = rendering(text.theirs, other)
        whole = align_conversation(self, ours, theirs)
        if isinstance(whole, str):
            return whole
        part = slice(start - first, start - first + length + 1)
        found = window_of(whole, part, self.teacher.begin)
        return self.too_long(len(found.teacher_ids)) or found


def ends_of_answers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Ends:
    """The tokens that end an answer in both chat templates; (None, None) where one has none.

    Raises:
        ConfigError: The teacher's tokenizer has no chat template.
    """
    if teacher.chat_template is None:
        raise ConfigError(
            "data.type: conversations are written for each model with its own chat template, and "
            "the teacher's tokenizer has none. Use a chat model as teacher, or data of type text "
            "or completion."
        )
    ends = end_of_answer(student), end_of_answer(teacher)
    return (None, None) if None in ends else ends


def tokens_of(data: TextData, window: int) -> Int32[np.ndarray, " t"]:
    """Tokens of a window, the last target included."""
    start, length, _ = data.windows[window].tolist()
    return data.tokens[start : start + length + 1]


def key_of(tokens: Int[np.ndarray, " t"]) -> int:
    """Hash of a window's tokens."""
    return xxhash.xxh3_64_intdigest(tokens.astype(np.int32).tobytes())


def rendering(data: TextData, document: int) -> tuple[int, Rendering]:
    """First token of a document, and all of it."""
    first = int(data.document_ends[document - 1]) if document else 0
    place = slice(first, int(data.document_ends[document]))
    return first, Rendering(data.tokens[place].astype(np.int64), np.asarray(data.scored[place]))


def matched(ours: TextData, theirs: TextData) -> Int64[np.ndarray, " documents"]:
    """Of each document of one reading the one at the same file and line of another, or -1."""
    places = [
        (data.document_places[:, 0] << 40) + data.document_places[:, 1] for data in (ours, theirs)
    ]
    found = np.minimum(np.searchsorted(places[1], places[0]), max(len(places[1]) - 1, 0))
    same = places[1][found] == places[0]
    return np.where(same, found, -1)
