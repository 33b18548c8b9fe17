"""How much of a text's tokens a loss between two vocabularies reaches, by class of token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int64

from limbeck.tokenizers.alignment import Alignment
from limbeck.tokenizers.outcomes import Outcomes
from limbeck.tokenizers.token_bytes import TokenBytes

MIN_COVERED = 0.2
"""Share of a class's tokens below which the class counts as uncovered. A character of three bytes
that is one token of the teacher is compared at its first byte only."""

MIN_TOKENS = 20
"""Tokens of a class below which nothing is said about it."""

CLASSES = (
    "words",
    "digits",
    "runs of spaces",
    "punctuation and code",
    "other scripts",
    "parts of characters",
    "special tokens",
)


@dataclass
class Count:
    """Tokens of one class in a text.

    Attributes:
        tokens: How many.
        compared: Those predicted where both tokenizers stand at one byte.
        exact: Those of `compared` that are the same token in the other vocabulary.
        merged: Those of `compared` that share their outcome with other tokens.
    """

    tokens: int = 0
    compared: int = 0
    exact: int = 0
    merged: int = 0

    @property
    def covered(self) -> float:
        """Share of the tokens that the loss reaches."""
        return (self.exact + self.merged) / max(self.tokens, 1)


@dataclass
class Coverage:
    """Counts of both directions by class.

    Attributes:
        student: The student's tokens of the text.
        teacher: The teacher's tokens of the same text.
    """

    student: dict[str, Count] = field(default_factory=lambda: {c: Count() for c in CLASSES})
    teacher: dict[str, Count] = field(default_factory=lambda: {c: Count() for c in CLASSES})

    @property
    def directions(self) -> Mapping[str, Mapping[str, Count]]:
        """Both, by whose tokens are counted."""
        return {"student": self.student, "teacher": self.teacher}

    def uncovered(self) -> list[str]:
        """Classes of which less than a fifth is reached, with whose tokens they are."""
        return [
            f"{name} of the {who} ({count.covered:.0%} of {count.tokens:,} tokens)"
            for who, counts in self.directions.items()
            for name, count in counts.items()
            if count.tokens >= MIN_TOKENS and count.covered < MIN_COVERED
        ]

    def lines(self) -> Iterator[str]:
        """A line for each side, and a warning where most tokens are compared by their start only.

        A class is left out where the text has none of it.
        """
        for who, counts in self.directions.items():
            shares = [
                f"{name} {count.covered:.0%} ({count.exact / max(count.tokens, 1):.0%}) of "
                f"{count.tokens:,}"
                for name, count in counts.items()
                if count.tokens
            ]
            yield (
                f"Coverage of the {who}'s tokens by class, in brackets as the same token: "
                f"{'; '.join(shares)}."
            )
        for name, count in self.student.items():
            if count.tokens >= MIN_TOKENS and count.exact < count.merged:
                yield (
                    f"Most of the student's {name} are compared with the teacher by their first "
                    "part only: the rest of such a token is learned from the text alone."
                )


def add_coverage(
    coverage: Coverage,
    student_ids: Int64[np.ndarray, " t"],
    scored: Bool[np.ndarray, " t"],
    aligned: Alignment,
    outcomes: Outcomes,
    classes: tuple[Int64[np.ndarray, " V"], Int64[np.ndarray, " W"]],
) -> None:
    """Count the scored tokens of an aligned stretch, and the teacher's tokens that end in one.

    Args:
        coverage: Counts are added to it.
        student_ids: The stretch.
        scored: Which of it are trained on.
        aligned: The same in the teacher's tokens.
        outcomes: Of both vocabularies.
        classes: Number of the class of each student id and of each teacher id.
    """
    standing = aligned.standing
    # A token is compared where both stand before it.
    student_at = standing[:-1] >= 0
    teacher_at = np.isin(np.arange(len(aligned.teacher_ids) - 1), standing)
    nothing = outcomes.num_outcomes
    ends_in = np.searchsorted(aligned.student_edges, aligned.teacher_edges)
    teacher_scored = np.append(scored, False)[ends_in]
    for counts, ids, own, at, of, exact, class_of in (
        (coverage.student, student_ids, scored, student_at, outcomes.student,
         outcomes.student_exact, classes[0]),
        (coverage.teacher, aligned.teacher_ids, teacher_scored, teacher_at, outcomes.teacher,
         outcomes.teacher_exact, classes[1]),
    ):  # fmt: skip
        chosen, counted = own[1:], ids[1:][own[1:]]
        count(counts, class_of[counted], at[chosen], exact[counted], of[counted] != nothing)


def count(
    counts: dict[str, Count],
    class_of: Int64[np.ndarray, " n"],
    compared: Bool[np.ndarray, " n"],
    exact: Bool[np.ndarray, " n"],
    rooted: Bool[np.ndarray, " n"],
) -> None:
    """Add the tokens of one side to their classes."""
    for number, name in enumerate(CLASSES):
        mine = class_of == number
        own = counts[name]
        own.tokens += int(mine.sum())
        own.compared += int((mine & compared).sum())
        own.exact += int((mine & compared & exact).sum())
        own.merged += int((mine & compared & rooted & ~exact).sum())


def classes_of(side: TokenBytes) -> Int64[np.ndarray, " V"]:
    """Number of the class, in `CLASSES`, of each id."""
    names = [
        "special tokens" if i in side.special else class_of(raw or b"")
        for i, raw in enumerate(side.bytes_of)
    ]
    return np.array([CLASSES.index(name) for name in names])


def class_of(raw: bytes) -> str:
    """The class of a token's bytes.

    Example:
        >>> [class_of(raw) for raw in (b" the", b"2005", b"    ", b"):", "天".encode(), b"\\xe5")]
        ['words', 'digits', 'runs of spaces', 'punctuation and code', 'other scripts', 'parts of \
characters']
    """
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        return "parts of characters"
    if not text:
        return "runs of spaces"
    if not text.isascii():
        return "other scripts"
    return "digits" if text.isdigit() else "words" if text.isalpha() else "punctuation and code"
