"""The plan of a recording: which windows go into which shard; a pure function of the data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from limbeck.errors import ConfigError
from limbeck.store import Sample
from limbeck.teachers import TextWindows
from limbeck.teachers.stored import window_of


class PlannedWindow(NamedTuple):
    """A window of the plan: index of its text, its number in that text, and its length."""

    text: int
    number: int
    positions: int


@dataclass(frozen=True)
class ShardPlan:
    """The shards of a recording.

    Attributes:
        texts: Training text, then held-out text.
        shards: The windows of each shard, in recording order.
        data_hash: Over the keys of all windows, in order.
    """

    texts: tuple[TextWindows, ...]
    shards: tuple[tuple[PlannedWindow, ...], ...]
    data_hash: str

    @property
    def num_windows(self) -> int:
        """Number of distinct windows."""
        return sum(map(len, self.shards))

    @property
    def num_positions(self) -> int:
        """Number of positions the teacher reads."""
        return sum(window.positions for shard in self.shards for window in shard)

    @property
    def num_scored(self) -> int:
        """Number of scored positions."""
        return sum(self.sample(window).num_scored for shard in self.shards for window in shard)

    def sample(self, window: PlannedWindow) -> Sample:
        """A window as a sample of the store."""
        return window_of(self.texts[window.text].data, window.number)


def plan_shards(texts: Sequence[TextWindows], shard_tokens: int) -> ShardPlan:
    """Every distinct window once, in data order, in shards of at most `shard_tokens` positions.

    The plan does not depend on the machine, the number of processes or earlier recordings.
    """
    shards: list[list[PlannedWindow]] = [[]]
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    filled = 0
    for number, text in enumerate(texts):
        data = text.data
        for window in text.windows:
            key = window_of(data, window).key
            if key in seen:
                continue
            seen.add(key)
            digest.update(key)
            length = int(data.windows[window, 1])
            if shards[-1] and filled + length > shard_tokens:
                shards.append([])
                filled = 0
            shards[-1].append(PlannedWindow(number, window, length))
            filled += length
    return ShardPlan(tuple(texts), tuple(map(tuple, shards)), digest.hexdigest())


def passes(shard: Sequence[PlannedWindow], capacity: int) -> Iterator[list[PlannedWindow]]:
    """Consecutive windows of a shard that share one row of at most `capacity` positions.

    A window that fills a row is alone, and its hidden states are those of a training row.
    """
    row: list[PlannedWindow] = []
    filled = 0
    for window in shard:
        if row and filled + window.positions > capacity:
            yield row
            row, filled = [], 0
        row.append(window)
        filled += window.positions
    if row:
        yield row


def parse_part(text: str) -> tuple[int, int]:
    """The part of a recording, `3/16`, as (0-based number, number of parts).

    Example:
        >>> parse_part("3/16")
        (2, 16)
    """
    match = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", text.strip())
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(
            f"--shards must say which part of how many, as 1/16 to 16/16, got {text!r}. Give each "
            "machine another first number and the same second one."
        )
    return int(match[1]) - 1, int(match[2])


def own_shards(num_shards: int, part: tuple[int, int]) -> list[int]:
    """The shards of a part.

    Example:
        >>> own_shards(7, (2, 3))
        [2, 5]
    """
    number, parts = part
    return list(range(number, num_shards, parts))
