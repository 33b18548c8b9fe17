"""Drawn tokens as planes: how many differ in each row, their ranks' gaps, how often each came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import DataError
from limbeck.store import id_sets
from limbeck.store.planes import Unpacker
from limbeck.store.ranks import Ranks

ENTROPY_STEPS = 4096
"""Steps a nat of a stored entropy, which is off by at most 1 / 8192 and ends at 16 nats."""


def widened(parts: Sequence[Int[Tensor, "_ _"]]) -> Int[Tensor, "N k"]:
    """Rows of all parts, filled with 0 up to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def encode_counts(
    ids: Int[Tensor, "N k"], counts: Int[Tensor, "N k"], ranks: Ranks, num_draws: int
) -> list[np.ndarray]:
    """Planes of drawn tokens: how many differ in each row, their ranks' gaps, their counts."""
    of_ids = ranks.of_ids[ids.cpu().numpy()].astype(np.int64)
    there = counts.cpu().numpy() > 0
    order = np.argsort(np.where(there, of_ids, ranks.vocabulary_size), axis=-1)
    of_ids = np.take_along_axis(of_ids, order, -1)
    sorted_counts = np.take_along_axis(counts.cpu().numpy(), order, -1)
    there = sorted_counts > 0
    gaps = id_sets.to_gaps(of_ids)[there]
    return [
        *id_sets.to_planes(there.sum(-1).astype(np.int64) - 1, num_draws),
        *id_sets.to_planes(gaps, ranks.vocabulary_size),
        *id_sets.to_planes(sorted_counts[there].astype(np.int64) - 1, num_draws),
    ]


def decode_counts(
    unpack: Unpacker, num_scored: int, ranks: Ranks, num_draws: int
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Ids and counts of drawn tokens; a count of 0 fills up short rows.

    Raises:
        DataError: The counts of a row do not add up, or an id is none of the vocabulary's.
    """
    narrow = range(id_sets.num_bytes(num_draws))
    different = id_sets.from_planes([unpack.next(num_scored) for _ in narrow]) + 1
    if num_scored and int(different.max()) > num_draws:
        raise DataError(f"A position has more different tokens than its {num_draws} draws.")
    entries, width = int(different.sum()), int(different.max(initial=0))
    wide = range(id_sets.num_bytes(ranks.vocabulary_size))
    gaps = id_sets.from_planes([unpack.next(entries) for _ in wide])
    drawn = id_sets.from_planes([unpack.next(entries) for _ in narrow]) + 1
    there = np.arange(width) < different[:, None]
    padded_gaps = np.zeros((num_scored, width), dtype=np.int64)
    padded_gaps[there] = gaps
    counts = np.zeros((num_scored, width), dtype=np.int64)
    counts[there] = drawn
    if not bool((counts.sum(-1) == num_draws).all()):
        raise DataError(f"The counts of a position do not add up to its {num_draws} draws.")
    sorted_ranks = (padded_gaps + 1).cumsum(-1) - 1
    ids = id_sets.ids_at(np.where(there, sorted_ranks, 0), ranks)
    return torch.from_numpy(ids), torch.from_numpy(counts)


def encode_entropy(entropy_nats: Float[Tensor, " N"]) -> list[np.ndarray]:
    """Entropies in two bytes each."""
    steps = np.rint(entropy_nats.double().cpu().numpy() * ENTROPY_STEPS).clip(0, 65535)
    return id_sets.to_planes(steps.astype(np.int64), 1 << 16)


def decode_entropy(unpack: Unpacker, num_scored: int) -> Float[Tensor, " N"]:
    """What `encode_entropy` was given, within 1 / 8192 nat."""
    steps = id_sets.from_planes([unpack.next(num_scored) for _ in range(2)])
    return torch.from_numpy((steps / ENTROPY_STEPS).astype(np.float32))
