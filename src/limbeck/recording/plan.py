"""Which windows a store holds, and in which shard each stands: a pure function of the data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from limbeck.data import TextData
from limbeck.errors import ConfigError
from limbeck.store import Sample
from limbeck.teachers.stored import window_of


class Windows(NamedTuple):
    """Windows of one tokenised text that are to be recorded."""

    data: TextData
    chosen: Sequence[int]


class PlannedWindow(NamedTuple):
    """Where a window stands: its text among those of the plan, its number in it, its positions."""

    text: int
    window: int
    positions: int


@dataclass(frozen=True)
class Plan:
    """The shards of a recording.

    Attributes:
        texts: Training text, then held-out text.
        shards: Of each shard its windows, in the order they are recorded.
        data_hash: Over the keys of all windows, in order.
    """

    texts: tuple[Windows, ...]
    shards: tuple[tuple[PlannedWindow, ...], ...]
    data_hash: str

    @property
    def num_windows(self) -> int:
        """Different windows."""
        return sum(map(len, self.shards))

    @property
    def num_positions(self) -> int:
        """Positions the teacher reads."""
        return sum(place.positions for shard in self.shards for place in shard)

    @property
    def num_scored(self) -> int:
        """Tokens the store will speak about."""
        return sum(self.sample(place).num_scored for shard in self.shards for place in shard)

    def sample(self, place: PlannedWindow) -> Sample:
        """A window as the store knows it."""
        return window_of(self.texts[place.text].data, place.window)


def plan_shards(texts: Sequence[Windows], shard_tokens: int) -> Plan:
    """Every different window once, in the data's order, cut into shards of so many positions.

    Nothing of it depends on the machine, the number of processes or what is recorded already.
    """
    shards: list[list[PlannedWindow]] = [[]]
    seen: set[bytes] = set()
    told = hashlib.sha256()
    filled = 0
    for number, (data, chosen) in enumerate(texts):
        for window in chosen:
            key = window_of(data, window).key
            if key in seen:
                continue
            seen.add(key)
            told.update(key)
            length = int(data.windows[window, 1])
            if shards[-1] and filled + length > shard_tokens:
                shards.append([])
                filled = 0
            shards[-1].append(PlannedWindow(number, window, length))
            filled += length
    return Plan(tuple(texts), tuple(map(tuple, shards)), told.hexdigest())


def passes(shard: Sequence[PlannedWindow], capacity: int) -> Iterator[list[PlannedWindow]]:
    """Consecutive windows of a shard that share one row of the teacher's forward pass.

    A window that fills a row is alone, and its hidden states are those of a training row.
    """
    row: list[PlannedWindow] = []
    filled = 0
    for place in shard:
        if row and filled + place.positions > capacity:
            yield row
            row, filled = [], 0
        row.append(place)
        filled += place.positions
    if row:
        yield row


def parse_part(told: str) -> tuple[int, int]:
    """The part of a recording a process does, `3/16`, as (number from 0, of how many).

    Example:
        >>> parse_part("3/16")
        (2, 16)

    Raises:
        ConfigError: It is no such part.
    """
    found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", told.strip())
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigError(
            f"--shards must say which part of how many, as 1/16 to 16/16, got {told!r}. Give each "
            "machine another first number and the same second one."
        )
    return int(found[1]) - 1, int(found[2])


def own_shards(num_shards: int, part: tuple[int, int]) -> list[int]:
    """Numbers of the shards that belong to a part.

    Example:
        >>> own_shards(7, (2, 3))
        [2, 5]
    """
    number, parts = part
    return list(range(number, num_shards, parts))
