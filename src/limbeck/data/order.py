"""The order of samples, as a pure function of seed and step.

The step number is all the state there is: resuming needs no loader state, and every world size
sees the same rows in the same step.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

EPOCH_BITS = 32
"""The first source of a mixture has the seeds 0, 1, ... of a text alone, the next 2^32, ..."""


def spread(num_rows: int, count: int) -> list[int]:
    """`count` row numbers spread evenly over the text; all rows if there are fewer.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    count = min(count, num_rows)
    return [i * num_rows // count for i in range(count)]


def permutation(seed: int, epoch: int, num_rows: int) -> Int64[np.ndarray, " rows"]:
    """A permutation of the rows, another one each epoch; read-only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    rows = generator.permutation(num_rows).astype(np.int64, copy=False)
    rows.setflags(write=False)
    return rows


class Portion(NamedTuple):
    """Consecutive rows of a text that are read as one source.

    Attributes:
        share: Of all rows that a run reads; the shares of a text add up to 1.
    """

    first_row: int
    num_rows: int
    share: float


class MixedOrder:
    """The rows a run reads, as a pure function of the seed and the place in the run.

    Row number j of a portion, counted over all its epochs, has the time (j + 1/2) / share. The run
    reads rows in the order of their times, so that of any first p rows a portion has its share to
    within 1/2 + share * portions / 2 rows. A portion that ends starts again in another order.
    """

    def __init__(self, seed: int, portions: Sequence[Portion]) -> None:
        self._seed, self._portions = seed, tuple(portions)
        # this epoch's order and the last one's, of each portion
        self._order = functools.lru_cache(2 * len(self._portions))(permutation)

    def rows(self, begin: int, end: int) -> list[int]:
        """The rows from one place of the run to another, counted from 0."""
        shares = np.array([portion.share for portion in self._portions])
        sources, numbers = turns(begin, end, shares)
        return [self._row(s, n) for s, n in zip(sources.tolist(), numbers.tolist(), strict=True)]

    def _row(self, source: int, number: int) -> int:
        portion = self._portions[source]
        epoch, place = divmod(number, portion.num_rows)
        order = self._order(self._seed, (source << EPOCH_BITS) + epoch, portion.num_rows)
        return portion.first_row + int(order[place])

    @property
    def digest(self) -> str:
        """Hash of portions, shares and the first epoch of each, to be kept with a checkpoint.

        NumPy does not promise one stream across its versions; a resumed run compares this.
        """
        parts = [
            self._order(self._seed, source << EPOCH_BITS, portion.num_rows).astype("<i8").tobytes()
            for source, portion in enumerate(self._portions)
        ]
        if len(parts) > 1:
            shares = np.array([portion.share for portion in self._portions])
            parts.append(shares.astype("<f8").tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def one_order(seed: int, num_rows: int) -> MixedOrder:
    """The order of a text alone."""
    return MixedOrder(seed, [Portion(0, num_rows, 1.0)])


def turns(
    begin: int, end: int, shares: Float64[np.ndarray, " sources"]
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """Whose turn it is at each place of a run, and with which number of its own rows.

    Only rows near the places are sorted: of the first p rows each source has its share to within
    a number of rows that does not grow with p (see `MixedOrder`).

    Example:
        >>> turns(0, 4, np.array([0.75, 0.25]))
        (array([0, 0, 1, 0]), array([0, 1, 0, 2]))
    """
    margin = 1 + len(shares)
    firsts = np.maximum(np.floor(begin * shares).astype(np.int64) - margin, 0)
    lasts = np.ceil(end * shares).astype(np.int64) + margin
    sources = np.repeat(np.arange(len(shares)), lasts - firsts)
    numbers = np.concatenate([np.arange(*span) for span in zip(firsts, lasts, strict=True)])
    chosen = np.lexsort((sources, (numbers + 0.5) / shares[sources]))
    chosen = chosen[begin - int(firsts.sum()) :][: end - begin]
    return sources[chosen], numbers[chosen]


def step_span(step: int, rank: int, world_size: int, rows_per_step: int) -> tuple[int, int]:
    """The places of the run that one rank reads in one optimizer step.

    The ranks' places, joined in rank order, are those of the step whatever the world size.

    Args:
        rows_per_step: Rows of all ranks together.
    """
    first = step * rows_per_step
    begin = first + rank * rows_per_step // world_size
    return begin, first + (rank + 1) * rows_per_step // world_size
