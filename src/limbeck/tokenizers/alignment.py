"""Student tokens aligned with a teacher's tokens of the same text, by exact bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from limbeck.tokenizers.token_bytes import Spans, TokenBytes


@dataclass(frozen=True)
class Alignment:
    """A stretch of student tokens and the teacher's tokens of the same text.

    Edges count bytes of text, and 1 for each special token after the beginning.

    Attributes:
        teacher_ids: What the teacher reads.
        student_edges: Where each student token ends.
        teacher_edges: Where each teacher token ends.
        num_begin: How many tokens of the student, and of the teacher, come before the text.
    """

    teacher_ids: Int64[np.ndarray, " u"]
    student_edges: Int64[np.ndarray, " t"]
    teacher_edges: Int64[np.ndarray, " u"]
    num_begin: tuple[int, int] = (0, 0)

    @property
    def standing(self) -> Int64[np.ndarray, " t"]:
        """For each student token, the teacher token that ends at the same byte, or -1.

        Of several that stand there, the first of the teacher, whose others have no bytes, and the
        last of the student, which has read all of its beginning tokens.
        """
        if not len(self.teacher_edges):
            return np.full(len(self.student_edges), -1)
        found = np.searchsorted(self.teacher_edges, self.student_edges)
        found = np.minimum(found, len(self.teacher_edges) - 1)
        is_last = np.append(self.student_edges[1:] != self.student_edges[:-1], True)
        is_common = (self.teacher_edges[found] == self.student_edges) & is_last
        return np.where(is_common, found, -1)

    def chunks(self, predicted: Bool[np.ndarray, " t"]) -> Chunks:
        """The shortest byte ranges of whole tokens on both sides that both models predict.

        A token without bytes belongs to the chunk that follows it.

        Args:
            predicted: Which student tokens are; of the teacher's, all but the first.
        """
        sides = (self.student_edges, self.teacher_edges)
        ends = chunk_ends(*sides)
        student_of, teacher_of = (
            chunk_of_tokens(edges, ends, begin)
            for edges, begin in zip(sides, self.num_begin, strict=True)
        )
        is_whole = np.ones(len(ends) + 1, dtype=np.bool_)
        is_whole[student_of[~predicted]] = False
        is_whole[teacher_of[:1]] = False
        is_whole[-1] = False
        number = np.where(is_whole, np.cumsum(is_whole) - 1, -1)
        return Chunks(number[student_of], number[teacher_of], int(is_whole.sum()))


class Chunks(NamedTuple):
    """Chunks of text that are whole tokens on both sides.

    Attributes:
        student: Of each student token, or -1.
        teacher: Of each teacher token, or -1.
        num_chunks: How many they are.
    """

    student: Int64[np.ndarray, " t"]
    teacher: Int64[np.ndarray, " u"]
    num_chunks: int


@dataclass
class DecodedText:
    """The stretch of text that is being read, and what came before it."""

    texts: list[str] = field(default_factory=list)
    marks: list[int | None] = field(default_factory=list)
    """The teacher's special token after each text."""
    skipped: list[int] = field(default_factory=list)
    """Bytes before each text that are no whole character."""
    lengths: list[int] = field(default_factory=list)
    num_begin: int = 0


class Aligner:
    """Reads student tokens as text, and the text as teacher tokens."""

    def __init__(
        self, student: TokenBytes, teacher: TokenBytes, max_teacher_tokens: int | None = None
    ) -> None:
        """
        Args:
            student: Of the ids that are aligned.
            teacher: Reads the text again.
            max_teacher_tokens: The longest sequence the teacher reads.
        """
        self.student, self.teacher = student, teacher
        self._limit = max_teacher_tokens
        self.counterparts = counterparts(student, teacher)

    def align(self, stretches: Sequence[Sequence[int]]) -> list[Alignment | str]:
        """Each stretch of student tokens aligned, or why it cannot be.

        The teacher's own beginning tokens take the place of the student's. A stretch may begin or
        end within a character; those bytes stand in no teacher token.
        """
        decoded = [self._decoded(ids) for ids in stretches]
        texts = [text for each in decoded if isinstance(each, DecodedText) for text in each.texts]
        spans = iter(self.teacher.spans(texts))
        return [each if isinstance(each, str) else self._joined(each, spans) for each in decoded]

    def too_long(self, num_tokens: int) -> str | None:
        """Why the teacher cannot read so many tokens; None where it can."""
        if self._limit is None or num_tokens <= self._limit:
            return None
        return (
            f"it is {num_tokens:,} tokens of the teacher, which reads at most {self._limit:,}; "
            "lower data.sequence_length"
        )

    def _decoded(self, ids: Sequence[int]) -> DecodedText | str:
        """The texts between special tokens."""
        begin = self.student.begin
        num_begin = len(begin) if begin and tuple(ids[: len(begin)]) == begin else 0
        decoded = DecodedText(lengths=[0] * num_begin, num_begin=num_begin)
        places = [n for n, i in enumerate(ids) if i in self.student.special and n >= num_begin]
        for start, stop in itertools.pairwise([num_begin - 1, *places, len(ids)]):
            pieces = [self.student.bytes_of[i] for i in ids[start + 1 : stop]]
            known = [piece for piece in pieces if piece is not None]
            if len(known) < len(pieces):
                return "the student's tokenizer has no token for a part of it"
            decoded.lengths += map(len, known)
            is_first, is_last = start == num_begin - 1, stop == len(ids)
            read = whole_characters(b"".join(known), at_start=is_first, at_end=is_last)
            if read is None:
                return "the student's tokens are no valid UTF-8"
            decoded.skipped.append(read[0])
            decoded.texts.append(read[1])
            if is_last:
                break
            mark = self.counterparts.get(ids[stop])
            if mark is None and stop < len(ids) - 1:
                token = self.student.added[ids[stop]]
                return f"the student's special token {token!r} has no counterpart in the teacher"
            decoded.marks.append(mark)
            decoded.lengths.append(1)
        return decoded

    def _joined(self, decoded: DecodedText, spans: Iterator[Spans | str]) -> Alignment | str:
        own = [next(spans) for _ in decoded.texts]
        begin = list(self.teacher.begin)
        ids, edges, at = begin, [np.zeros(len(begin), dtype=np.int64)], 0
        for index, each in enumerate(own):
            if isinstance(each, str):
                return each
            at += decoded.skipped[index]
            ids += each.ids
            edges.append(at + each.edges[1:])
            at += int(each.edges[-1])
            if index < len(decoded.marks) and (mark := decoded.marks[index]) is not None:
                at += 1
                ids.append(mark)
                edges.append(np.array([at]))
        return self.too_long(len(ids)) or Alignment(
            np.array(ids, dtype=np.int64),
            np.cumsum(np.array(decoded.lengths, dtype=np.int64)),
            np.concatenate(edges),
            (decoded.num_begin, len(self.teacher.begin)),
        )


def counterparts(student: TokenBytes, teacher: TokenBytes) -> dict[int, int]:
    """The teacher's special token for each of the student's: the end, and those of equal text."""
    by_text = {teacher.added[i]: i for i in sorted(teacher.special)}
    found = {i: by_text[student.added[i]] for i in student.special if student.added[i] in by_text}
    if student.end is not None and teacher.end is not None:
        found[student.end] = teacher.end
    return found


def whole_characters(raw: bytes, *, at_start: bool, at_end: bool) -> tuple[int, str] | None:
    """Bytes before the first whole character, and the text; None where the bytes are not UTF-8.

    Args:
        raw: The bytes.
        at_start: Whether they may begin within a character.
        at_end: Whether they may end within one.
    """
    skipped = 0
    while at_start and skipped < min(3, len(raw)) and raw[skipped] & 0xC0 == 0x80:
        skipped += 1
    raw = raw[skipped:]
    try:
        return skipped, raw.decode()
    except UnicodeDecodeError as error:
        is_cut = at_end and error.end == len(raw) and error.reason == "unexpected end of data"
        return (skipped, raw[: error.start].decode()) if is_cut else None


def chunk_ends(
    first: Int64[np.ndarray, " t"], second: Int64[np.ndarray, " u"]
) -> Int64[np.ndarray, " c"]:
    """Ends of the shortest byte ranges that are whole tokens in both tokenisations.

    Args:
        first: Where the tokens of one end.
        second: Where those of the other end.
    """
    ends = np.intersect1d(first, second)
    return ends[ends > 0]


def chunk_of_tokens(
    edges: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " c"], num_begin: int
) -> Int64[np.ndarray, " n"]:
    """Number of the chunk that each token begins in; the number of chunks where it is in none."""
    starts = np.concatenate([[0], edges[:-1]])
    found = np.searchsorted(ends, starts, side="right")
    found[:num_begin] = len(ends)
    return found
