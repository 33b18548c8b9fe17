"""The order of samples, as a pure function of seed and step.

The step number is all the state there is: resuming needs no loader state, and every world size
sees the same rows in the same step.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from jaxtyping import Int64


@functools.lru_cache(2)
def order(seed: int, epoch: int, num_rows: int) -> Int64[np.ndarray, " rows"]:
    """A permutation of the rows, another one each epoch; read-only."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    permutation = generator.permutation(num_rows).astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


def step_rows(
    step: int, rank: int, world_size: int, *, seed: int, num_rows: int, rows_per_step: int
) -> list[int]:
    """Rows that one rank reads in one optimizer step.

    The ranks' rows, joined in rank order, are the step's `rows_per_step` rows whatever the world
    size; a step may cross from one epoch into the next.

    Args:
        rows_per_step: Rows of all ranks together.
    """
    first = step * rows_per_step
    begin = first + rank * rows_per_step // world_size
    end = first + (rank + 1) * rows_per_step // world_size
    return [int(order(seed, p // num_rows, num_rows)[p % num_rows]) for p in range(begin, end)]


def order_digest(seed: int, num_rows: int) -> str:
    """Hash of the first epoch's order, to be kept with a checkpoint.

    NumPy does not promise one stream across its versions; a resumed run compares this.
    """
    return hashlib.sha256(order(seed, 0, num_rows).astype("<i8").tobytes()).hexdigest()
