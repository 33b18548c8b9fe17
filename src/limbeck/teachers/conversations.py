"""Windows of conversations, aligned with the teacher's own rendering of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int, Int64, UInt64

from limbeck.data import TextData
from limbeck.data.formats.chat import end_of_answer
from limbeck.errors import ConfigError, DataError
from limbeck.models import PreTrainedTokenizerBase
from limbeck.teachers.base import TextWindows
from limbeck.teachers.stored import window_of
from limbeck.tokenizers import (
    Aligner,
    Alignment,
    Rendering,
    TokenBytes,
    align_conversation,
    part_of,
)

KEPT = 32
"""Aligned conversations that are kept: windows of one conversation are read one after another."""


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
        self._tokenizer, self._skip = tokenizer, False
        self._texts: list[Indexed] = []
        self._aligned = lru_cache(maxsize=KEPT)(self._align)

    def read(self, texts: Sequence[TextWindows]) -> None:
        """Read the conversations of a run's texts again, in the teacher's tokens.

        Raises:
            ConfigError: The teacher's tokenizer cannot be used for them.
            DataError: The teacher's chat template refuses a conversation.
        """
        self._skip = False
        self._aligned.cache_clear()
        self._texts = [self._indexed(text) for text in texts if text.data.is_conversation.any()]

    def leave_out_answers(self) -> None:
        """From now on leave out answers that two templates write differently, and align others."""
        self._skip = True
        self._aligned.cache_clear()

    def align(self, stretches: Sequence[Sequence[int]]) -> list[Alignment | str]:
        found = [self._known(np.array(ids, dtype=np.int64)) for ids in stretches]
        others = [ids for ids, own in zip(stretches, found, strict=True) if own is None]
        rest = iter(super().align(others))
        return [next(rest) if own is None else own for own in found]

    def _indexed(self, text: TextWindows) -> Indexed:
        data = text.data
        is_conversation = data.is_conversation
        chosen = [w for w in text.windows if is_conversation[data.windows[w, 2]]]
        keys = np.array([key_of(window_of(data, w).tokens) for w in chosen], dtype=np.uint64)
        order = np.argsort(keys, stable=True)
        try:
            theirs = data.whole_in(self._tokenizer)
        except (ConfigError, DataError) as error:
            problem = f"{text.option}, in the teacher's chat template: {error}"
            raise type(error)(problem) from error
        windows = np.array(chosen, dtype=np.int64)[order]
        return Indexed(keys[order], windows, data, theirs, matched(data, theirs))

    def _known(self, ids: Int64[np.ndarray, " t"]) -> Alignment | str | None:
        """The first alignment of the windows with these tokens; None for other text."""
        key, found = np.uint64(key_of(ids)), None
        for number, text in enumerate(self._texts):
            first, stop = (int(np.searchsorted(text.keys, key, side)) for side in ("left", "right"))
            for window in text.windows[first:stop].tolist():
                if np.array_equal(window_of(text.ours, window).tokens, ids):
                    found = self._window(number, window)
                    if not isinstance(found, str):
                        return found
        return found

    def _window(self, number: int, window: int) -> Alignment | str:
        data = self._texts[number].ours
        start, length, document = data.windows[window].tolist()
        whole = self._aligned(number, document)
        if isinstance(whole, str):
            return whole
        first = start - document_place(data, document).start
        found = part_of(whole, slice(first, first + length + 1), self.teacher.begin)
        return self.too_long(len(found.teacher_ids)) or found

    def _align(self, number: int, document: int) -> Alignment | str:
        """A whole conversation of a text."""
        text = self._texts[number]
        other = int(text.their_documents[document])
        if other < 0:
            return "the teacher's chat template cannot write it"
        ours, theirs = rendering(text.ours, document), rendering(text.theirs, other)
        return align_conversation(self, ours, theirs, skip=self._skip)


def ends_of_answers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[int | None, int | None]:
    """The tokens that end an answer in both chat templates.

    Raises:
        ConfigError: The teacher's tokenizer has no chat template.
    """
    if teacher.chat_template is None:
        raise ConfigError(
            "data.type: conversations are written for each model with its own chat template, and "
            "the teacher's tokenizer has none. Use a chat model as teacher, or data of type text "
            "or completion."
        )
    return end_of_answer(student), end_of_answer(teacher)


def key_of(tokens: Int[np.ndarray, " t"]) -> int:
    """Hash of a window's tokens."""
    return xxhash.xxh3_64_intdigest(tokens.astype(np.int32).tobytes())


def document_place(data: TextData, document: int) -> slice:
    """Where the tokens of a document are."""
    first = int(data.document_ends[document - 1]) if document else 0
    return slice(first, int(data.document_ends[document]))


def rendering(data: TextData, document: int) -> Rendering:
    """All tokens of a document."""
    place = document_place(data, document)
    return Rendering(data.tokens[place].astype(np.int64), np.asarray(data.scored[place]))


def matched(ours: TextData, theirs: TextData) -> Int64[np.ndarray, " documents"]:
    """Of each document of one reading the one at the same file and line of another, or -1."""
    places = [
        (data.document_places[:, 0] << 40) + data.document_places[:, 1] for data in (ours, theirs)
    ]
    found = np.minimum(np.searchsorted(places[1], places[0]), max(len(places[1]) - 1, 0))
    same = places[1][found] == places[0]
    return np.where(same, found, -1)
