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
"""Characters of an answer that a message shows."""

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
        is_closed: Whether the end of the turn follows, and nothing else of the answer.
    """

    start: int
    ends: Edges
    text: bytes
    is_closed: bool

    def part(self, place: slice) -> AnswerTokens:
        """The whole tokens of a part of its bytes, and the token that the part begins in."""
        first = int(np.searchsorted(self.ends, place.start, side="right"))
        stop = int(np.searchsorted(self.ends, place.stop, side="right"))
        is_closed = self.is_closed and place.stop == len(self.text)
        ends = self.ends[first:stop] - place.start
        return AnswerTokens(self.start + first, ends, self.text[place], is_closed)

    def begins_at(self, byte: int) -> bool:
        """Whether a token begins at a byte."""
        return byte == 0 or byte in self.ends


@dataclass
class PlacedTokens:
    """Where the tokens of one rendering end, of the first `count` of them."""

    edges: Edges
    count: int = 0

    def place(self, ends: Edges | list[int]) -> None:
        """Place the next tokens."""
        self.edges[self.count : self.count + len(ends)] = ends
        self.count += len(ends)


def align_conversation(
    aligner: Aligner, ours: Rendering, theirs: Rendering, *, skip: bool = False
) -> Alignment | str:
    """Both renderings aligned by the bytes of their answers, or why they cannot be.

    Nothing between answers is aligned: each template writes roles and turns in its own way. White
    space around an answer that the two write differently is not aligned either.

    Args:
        skip: Leave out an answer that differs, in place of all.
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
        places = shared_text(*(answer.text for answer in pair))
        if isinstance(places, str):
            if skip:
                continue
            return places
        whole = list(zip(pair, places, strict=True))
        shared = [answer.part(place) for answer, place in whole]
        is_joined = all(answer.begins_at(place.start) for answer, place in whole)
        at = place_between(placed, [answer.start for answer in shared], at, is_joined=is_joined)
        for side, answer in zip(placed, shared, strict=True):
            side.place(at + answer.ends)
        at += len(shared[0].text)
        if all(answer.is_closed for answer in shared):
            at += 1
            for side in placed:
                side.place([at])
    place_between(placed, [len(each.ids) for each in (ours, theirs)], at, is_joined=False)
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
        is_closed = ids[num_text:] == [side.turn_end]
        found.append(AnswerTokens(start, ends, b"".join(known), is_closed))
    return found


def runs(scored: Bool[np.ndarray, " n"]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of scored tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], scored, [False]])))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)


def shared_text(student: bytes, teacher: bytes) -> tuple[slice, slice] | str:
    """The bytes of an answer that both sides have, or where it differs.

    White space at its beginning or end belongs to them where it is the same on both sides.
    """
    whole = [raw.decode(errors="surrogateescape") for raw in (student, teacher)]
    cores = [text.strip() for text in whole]
    if cores[0] != cores[1]:
        pairs = enumerate(zip(*cores, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(map(len, cores)))
        ours, theirs = (core[same : same + SHOWN] for core in cores)
        return (
            f"the chat templates write an answer differently after {same} characters: {ours!r} "
            f"the student's, {theirs!r} the teacher's"
        )
    leads = [text[: len(text) - len(text.lstrip())].encode() for text in whole]
    trails = [text[len(text.rstrip()) :].encode() if text.strip() else b"" for text in whole]
    starts = [0, 0] if leads[0] == leads[1] else list(map(len, leads))
    cuts = [0, 0] if trails[0] == trails[1] else list(map(len, trails))
    return (
        slice(starts[0], len(student) - cuts[0]),
        slice(starts[1], len(teacher) - cuts[1]),
    )


def place_between(
    placed: list[PlacedTokens], starts: list[int], at: int, *, is_joined: bool
) -> int:
    """Place the tokens up to the next answer, with nowhere but its beginning in common.

    Args:
        starts: First token of the answer on each side.
        at: Where the last answer ends.
        is_joined: Whether both sides stand together before the answer.

    Returns:
        Where the answer's text begins.
    """
    counts = [start - side.count for side, start in zip(placed, starts, strict=True)]
    begin = at + 2 * max(counts) + 2
    for number, (side, count) in enumerate(zip(placed, counts, strict=True)):
        ends = at + 2 * np.arange(1, count + 1) - number
        ends[count - 1 :] = begin if is_joined else begin - number
        side.place(ends)
    return begin


def part_of(whole: Alignment, window: slice, teacher_begin: tuple[int, ...]) -> Alignment:
    """The alignment of a part of the student's tokens.

    If it begins within a conversation, the teacher reads its own beginning tokens, and then from
    the same share of the stretch between two common places: it has about the context of the
    student.

    Args:
        whole: That of the conversation.
        window: Which tokens of the student.
        teacher_begin: Tokens that the teacher's tokenizer puts before a text.
    """
    ours, theirs = whole.student_edges, whole.teacher_edges
    common = np.intersect1d(ours, theirs)
    passed = int(np.searchsorted(common, ours[window.start - 1], side="right"))
    passed = passed if window.start else 0
    base = int(common[passed - 1]) if passed else 0
    until = int(common[passed]) if passed < len(common) else int(ours[-1])
    spans = [np.searchsorted(edges, (base, until), side="right") for edges in (ours, theirs)]
    (begins, ends), (first, last) = (span.tolist() for span in spans)
    first += (window.start - begins) * (last - first) // max(ends - begins, 1)
    stop = int(np.searchsorted(theirs, ours[window][-1], side="right"))
    begin = teacher_begin if first else ()
    return Alignment(
        np.array([*begin, *whole.teacher_ids[first:stop]], dtype=np.int64),
        ours[window] - base,
        np.concatenate([np.zeros(len(begin), dtype=np.int64), theirs[first:stop] - base]),
        (0, len(begin)),
    )
