"""Outcomes that two vocabularies share, for comparing their next-token distributions.

Each token has a root: the shared token (the same bytes in both vocabularies) that is reached by
taking, again and again, the first token of the other tokenizer's reading of it, which is ever
shorter. Tokens with one root are one outcome. With equal vocabularies every token is its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from limbeck.tokenizers.alignment import counterparts
from limbeck.tokenizers.token_bytes import TokenBytes

Key = tuple[bytes, str | int]
"""What a token is matched by: its bytes, and how many ids before it have the same."""

ADDED = "added"


@dataclass(frozen=True)
class Outcomes:
    """Outcome of every id on both sides.

    Attributes:
        student: Of each student id, from 0 to K; K where the teacher cannot spell it.
        teacher: Of each teacher id; K where the student cannot spell it.
        num_outcomes: K.
        student_exact: Whether a student id is the same token in the teacher.
        teacher_exact: Whether a teacher id is the same token in the student.
    """

    student: Int64[np.ndarray, " V"]
    teacher: Int64[np.ndarray, " W"]
    num_outcomes: int
    student_exact: Bool[np.ndarray, " V"]
    teacher_exact: Bool[np.ndarray, " W"]


def shared_outcomes(student: TokenBytes, teacher: TokenBytes) -> Outcomes:
    """The finest outcomes that both vocabularies can tell apart by first shared tokens."""
    student_keys, teacher_keys = keys(student), keys(teacher)
    for ours, theirs in counterparts(student, teacher).items():
        student_keys[ours] = teacher_keys[theirs]
    join_turn_ends((student, teacher), (student_keys, teacher_keys))
    both = sorted((set(student_keys) & set(teacher_keys)) - {None}, key=repr)
    shared = {key: number for number, key in enumerate(both) if key is not None}
    rooted = Roots(shared, (student, teacher), (student_keys, teacher_keys))
    return Outcomes(
        student=np.array([rooted.of(key, 0) for key in student_keys]),
        teacher=np.array([rooted.of(key, 1) for key in teacher_keys]),
        num_outcomes=len(shared),
        student_exact=np.array([key in shared for key in student_keys]),
        teacher_exact=np.array([key in shared for key in teacher_keys]),
    )


def join_turn_ends(
    sides: tuple[TokenBytes, TokenBytes], side_keys: tuple[list[Key | None], list[Key | None]]
) -> None:
    """Match the tokens that end answers; one that also ends texts is matched with both."""
    ours, theirs = (side.turn_end for side in sides)
    if ours is None or theirs is None:
        return
    ends_texts = ours == sides[0].end or theirs == sides[1].end
    key = side_keys[1][theirs]
    for side, own_keys, turn_end in zip(sides, side_keys, (ours, theirs), strict=True):
        own_keys[turn_end] = key
        if ends_texts and side.end is not None:
            own_keys[side.end] = key


class Roots:
    """Finds the shared token at the root of any token of two vocabularies."""

    def __init__(
        self,
        shared: dict[Key, int],
        sides: tuple[TokenBytes, TokenBytes],
        side_keys: tuple[list[Key | None], list[Key | None]],
    ) -> None:
        self._shared = shared
        self._sides = sides
        self._spelt = [{k[0] for k in own if k is not None and k[1] == 0} for own in side_keys]
        self._known: dict[tuple[bytes, int], int] = {}

    def of(self, key: Key | None, side: int) -> int:
        """Outcome of a token of side 0 or 1."""
        rest = len(self._shared)
        if key is None:
            return rest
        if key in self._shared:
            return self._shared[key]
        return rest if key[1] == ADDED else self._root(key[0], side)

    def _root(self, raw: bytes, side: int) -> int:
        path: list[tuple[bytes, int]] = []
        outcome: int | None = None
        while outcome is None:
            if (raw, 0) in self._shared:
                outcome = self._shared[raw, 0]
            elif (raw, side) in self._known:
                outcome = self._known[raw, side]
            else:
                path.append((raw, side))
                first = self._first(raw, 1 - side)
                if first is None or (first, 1 - side) in path:
                    outcome = len(self._shared)
                else:
                    raw, side = first, 1 - side
        self._known |= dict.fromkeys(path, outcome)
        return outcome

    def _first(self, raw: bytes, other: int) -> bytes | None:
        """First token of the other tokenizer; its longest token that begins the bytes otherwise."""
        first = self._sides[other].first_token(raw)
        if first and raw.startswith(first):
            return first
        spelt = self._spelt[other]
        return next((raw[:n] for n in range(len(raw), 0, -1) if raw[:n] in spelt), None)


def keys(side: TokenBytes) -> list[Key | None]:
    """What each id is matched by; None for one without bytes.

    Of ids with the same bytes, tokens of byte fallback come last ("a", then <0x61>). Added tokens
    are matched among themselves.
    """
    found: list[Key | None] = [None] * len(side)
    taken: Counter[bytes] = Counter()
    plain = [(i, raw) for i, raw in enumerate(side.bytes_of) if raw and i not in side.added]
    for token, raw in sorted(plain, key=lambda each: side.is_byte_token(each[0])):
        found[token] = (raw, taken[raw])
        taken[raw] += 1
    for token, text in side.added.items():
        found[token] = (text.encode(), ADDED)
    return found
