"""A conversation as two chat templates write it, aligned within the assistant's answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from limbeck.tokenizers.alignment import Aligner, Alignment
from limbeck.tokenizers.token_bytes import TokenBytes

SHOWN = 40
"""Bytes of an answer that a message shows."""

Edges = Int64[np.ndarray, " n"]


class Rendering(NamedTuple):
    """A conversation in the tokens of one side.

    Attributes:
        ids: Of the whole conversation.
        scored: Which of them are the assistant's answers, with their end-of-turn tokens.
    """

    ids: Int64[np.ndarray, " n"]
    scored: Bool[np.ndarray, " n"]


class AnswerTokens(NamedTuple):
    """An answer in the tokens of one side.

    Attributes:
        start: Its first token.
        ends: Where each token of its text ends, in bytes of the answer.
        text: Its bytes.
        is_closed: Whether a special token follows, the end of the turn.
    """

    start: int
    ends: Edges
    text: bytes
    is_closed: bool

    def without_space(self) -> AnswerTokens:
        """The same without the space it begins with."""
        return self._replace(ends=self.ends - 1, text=self.text[1:])

    def first(self, size: int) -> AnswerTokens:
        """The whole tokens of its first bytes; the end of the turn belongs to all of it."""
        is_closed = self.is_closed and size == len(self.text)
        return self._replace(
            ends=self.ends[self.ends <= size], text=self.text[:size], is_closed=is_closed
        )


@dataclass
class PlacedTokens:
    """Where the tokens of one rendering end, of the first `count` of them."""

    edges: Edges
    count: int = 0

    def place(self, ends: Edges | list[int]) -> None:
        """Place the next tokens."""
        self.edges[self.count : self.count + len(ends)] = ends
        self.count += len(ends)


def align_conversation(aligner: Aligner, ours: Rendering, theirs: Rendering) -> Alignment | str:
    """Both renderings aligned by the bytes of their answers, or why they cannot be.

    Nothing between answers is aligned: each template writes roles and turns in its own way. Both
    sides stand together before the first token of an answer, unless one of them puts a space
    before it. If one removes white space after an answer, its end of the turn is not aligned.
    """
    own, other = answers(aligner.student, ours), answers(aligner.teacher, theirs)
    if isinstance(own, str):
        return own
    if isinstance(other, str):
        return other
    if len(own) != len(other):
        return f"the student's chat template writes {len(own)} answers, the teacher's {len(other)}"
    placed = [PlacedTokens(np.empty(len(each.ids), dtype=np.int64)) for each in (ours, theirs)]
    at = 0
    for pair in zip(own, other, strict=True):
        starts = [answer.start for answer in pair]
        spaces = [int(answer.text[:1] == b" ") for answer in pair]
        spaces = [0, 0] if all(spaces) else spaces
        texts = [
            answer.without_space() if space else answer
            for answer, space in zip(pair, spaces, strict=True)
        ]
        if problem := difference(*(answer.text for answer in texts)):
            return problem
        size = min(len(answer.text) for answer in texts)
        shared = [answer.first(size) for answer in texts]
        at = place_between(placed, starts, at, spaces)
        for side, answer in zip(placed, shared, strict=True):
            side.place(at + answer.ends)
        at += size
        if all(answer.is_closed for answer in shared):
            at += 1
            for side in placed:
                side.place([at])
    place_between(placed, [len(each.ids) for each in (ours, theirs)], at, [0, 0])
    return Alignment(theirs.ids, placed[0].edges, placed[1].edges)


def answers(side: TokenBytes, rendering: Rendering) -> list[AnswerTokens] | str:
    """The answers of a rendering, up to the first special token of each."""
    found: list[AnswerTokens] = []
    for start, stop in runs(rendering.scored):
        ids = rendering.ids[start:stop].tolist()
        num_text = next((n for n, i in enumerate(ids) if i in side.special), len(ids))
        pieces = [side.bytes_of[i] for i in ids[:num_text]]
        known = [piece for piece in pieces if piece is not None]
        if len(known) < num_text:
            return f"the {side.who}'s tokenizer has no token for a part of it"
        ends = np.cumsum([len(piece) for piece in known], dtype=np.int64)
        found.append(AnswerTokens(start, ends, b"".join(known), num_text < len(ids)))
    return found


def runs(scored: Bool[np.ndarray, " n"]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of scored tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], scored, [False]])))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)


def difference(student: bytes, teacher: bytes) -> str | None:
    """Where the bytes of an answer differ, white space at its end aside; None where they do not."""
    if student.rstrip() == teacher.rstrip():
        return None
    pairs = enumerate(zip(student, teacher, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(student), len(teacher)))
    ours, theirs = (
        text[same : same + SHOWN].decode(errors="replace") for text in (student, teacher)
    )
    return (
        f"the chat templates write an answer differently after {same} bytes: {ours!r} the "
        f"student's, {theirs!r} the teacher's"
    )


def place_between(placed: list[PlacedTokens], starts: list[int], at: int, spaces: list[int]) -> int:
    """Place the tokens up to the next answer, with nowhere but its beginning in common.

    Args:
        starts: First token of the answer on each side.
        at: Where the last answer ends.
        spaces: Bytes before the answer's text that are tokenised with it.

    Returns:
        Where the answer's text begins.
    """
    counts = [start - side.count for side, start in zip(placed, starts, strict=True)]
    begin = at + 2 * max(counts) + 2
    for side, count, parity, space in zip(placed, counts, (0, 1), spaces, strict=True):
        ends = at + 2 * np.arange(1, count + 1) - parity
        ends[count - 1 :] = begin - space
        side.place(ends)
    return begin


def window_of(whole: Alignment, window: slice, teacher_begin: tuple[int, ...]) -> Alignment:
    """The alignment of a part of the student's tokens.

    The teacher reads from the last place before it where both sides stand together, after its own
    beginning tokens: the student has not read what came before either.

    Args:
        whole: That of the conversation.
        window: Which tokens of the student.
        teacher_begin: Tokens that the teacher's tokenizer puts before a text.
    """
    ours, theirs = whole.student_edges[window], whole.teacher_edges
    before = np.intersect1d(whole.student_edges[: window.start], theirs)
    base = int(before[-1]) if len(before) else 0
    first = int(np.searchsorted(theirs, base, side="right"))
    stop = int(np.searchsorted(theirs, ours[-1], side="right"))
    begin = teacher_begin if first else ()
    return Alignment(
        np.array([*begin, *whole.teacher_ids[first:stop]], dtype=np.int64),
        ours - base,
        np.concatenate([np.zeros(len(begin), dtype=np.int64), theirs[first:stop] - base]),
        (0, len(begin)),
    )
