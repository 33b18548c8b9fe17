"""Sampled tokens as byte planes: distinct tokens in each row, gaps of their ranks, counts."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import DataError
from limbeck.store import id_sets
from limbeck.store.byte_planes import Unpacker, from_planes, num_bytes, to_planes
from limbeck.store.token_ranks import TokenRanks

ENTROPY_STEPS = 4096
"""Resolution of a stored entropy, steps a nat: error at most 1 / 8192, range 0 to 16 nats."""


def encode_counts(
    ids: Int[Tensor, "N k"], counts: Int[Tensor, "N k"], ranks: TokenRanks, num_draws: int
) -> list[np.ndarray]:
    """Byte planes of sampled tokens and their counts; a count of 0 marks padding."""
    kept = counts.cpu().numpy()
    planes, order = id_sets.write_uneven(ids.cpu().numpy(), kept > 0, ranks, num_draws)
    in_order = np.take_along_axis(kept, order, -1)
    in_order = in_order[in_order > 0].astype(np.int64)
    return [*planes, *to_planes(in_order - 1, num_draws)]


def decode_counts(
    unpack: Unpacker, num_scored: int, ranks: TokenRanks, num_draws: int
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Ids and counts of sampled tokens; a count of 0 marks padding."""
    ids, present = id_sets.read_uneven(unpack, num_scored, ranks, num_draws)
    entries = int(present.sum())
    counts = np.zeros(ids.shape, dtype=np.int64)
    counts[present] = from_planes([unpack.next(entries) for _ in range(num_bytes(num_draws))]) + 1
    if not bool((counts.sum(-1) == num_draws).all()):
        raise DataError(f"The counts of a position do not add up to its {num_draws} draws.")
    return torch.from_numpy(ids), torch.from_numpy(counts)


def encode_entropy(entropy_nats: Float[Tensor, " N"]) -> list[np.ndarray]:
    """Entropies as two byte planes."""
    steps = np.rint(entropy_nats.double().cpu().numpy() * ENTROPY_STEPS).clip(0, 65535)
    return to_planes(steps.astype(np.int64), 1 << 16)


def decode_entropy(unpack: Unpacker, num_scored: int) -> Float[Tensor, " N"]:
    """Entropies in nats, within 1 / 8192."""
    steps = from_planes([unpack.next(num_scored) for _ in range(2)])
    return torch.from_numpy((steps / ENTROPY_STEPS).astype(np.float32))
