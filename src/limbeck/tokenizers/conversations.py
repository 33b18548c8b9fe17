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


class Answer(NamedTuple):
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

    @property
    def stop(self) -> int:
        """One past its last token, the end of the turn included."""
        return self.start + len(self.ends) + self.is_closed


@dataclass
class Side:
    """Where the tokens of one rendering end, as far as they are placed."""

    edges: Edges
    at: int = 0

    def place(self, ends: Edges | list[int]) -> None:
        """Place the next tokens."""
        self.edges[self.at : self.at + len(ends)] = ends
        self.at += len(ends)


def align_conversation(aligner: Aligner, ours: Rendering, theirs: Rendering) -> Alignment | str:
    """Both renderings aligned by the bytes of their answers, or why they cannot be.

    Nothing between answers is aligned: each template writes roles and turns in its own way. Both
    sides stand together before the first token of an answer, unless one of them puts a space
    before it.
    """
    found = [
        answers(side, each) for side, each in ((aligner.student, ours), (aligner.teacher, theirs))
    ]
    if problem := difference(*found):
        return problem
    sides = [Side(np.empty(len(each.ids), dtype=np.int64)) for each in (ours, theirs)]
    at = 0
    for pair in zip(*found, strict=True):
        has_space = [answer.text[:1] == b" " for answer in pair]
        spaces = [int(has and not all(has_space)) for has in has_space]
        at = place_between(sides, [answer.start for answer in pair], at, spaces)
        for side, answer, space in zip(sides, pair, spaces, strict=True):
            side.place(at + answer.ends - space)
        at += len(pair[0].text) - spaces[0]
        if all(answer.is_closed for answer in pair):
            at += 1
            for side in sides:
                side.place([at])
    place_between(sides, [len(each.ids) for each in (ours, theirs)], at, [0, 0])
    return Alignment(theirs.ids, sides[0].edges, sides[1].edges)


def answers(side: TokenBytes, rendering: Rendering) -> list[Answer] | str:
    """The answers of a rendering, up to the first special token of each."""
    found: list[Answer] = []
    for start, stop in runs(rendering.scored):
        ids = rendering.ids[start:stop].tolist()
        num_text = next((n for n, i in enumerate(ids) if i in side.special), len(ids))
        pieces = [side.bytes_of[i] for i in ids[:num_text]]
        known = [piece for piece in pieces if piece is not None]
        if len(known) < num_text:
            return f"the {side.who}'s tokenizer has no token for a part of it"
        ends = np.cumsum([len(piece) for piece in known], dtype=np.int64)
        found.append(Answer(start, ends, b"".join(known), num_text < len(ids)))
    return found


def runs(scored: Bool[np.ndarray, " n"]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of scored tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], scored, [False]])))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)


def difference(ours: list[Answer] | str, theirs: list[Answer] | str) -> str | None:
    """Why answers are not the same text on both sides, up to a space before it."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours if isinstance(ours, str) else str(theirs)
    if len(ours) != len(theirs):
        return (
            f"the student's chat template writes {len(ours)} answers of it, and the teacher's "
            f"{len(theirs)}"
        )
    for own, other in zip(ours, theirs, strict=True):
        if own.text.removeprefix(b" ") != other.text.removeprefix(b" "):
            texts = [answer.text[:SHOWN].decode(errors="replace") for answer in (own, other)]
            return (
                f"an answer begins with {texts[0]!r} as the student's chat template writes it, and "
                f"with {texts[1]!r} as the teacher's, and is not the same"
            )
    return None


def place_between(sides: list[Side], starts: list[int], at: int, spaces: list[int]) -> int:
    """Place the tokens up to the next answer, with nowhere but its beginning in common.

    Args:
        starts: First token of the answer on each side.
        at: Where the last answer ends.
        spaces: Bytes before the answer's text that are tokenised with it.

    Returns:
        Where the answer's text begins.
    """
    counts = [start - side.at for side, start in zip(sides, starts, strict=True)]
    begin = at + 2 * max(counts) + 2
    for side, count, parity, space in zip(sides, counts, (0, 1), spaces, strict=True):
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
