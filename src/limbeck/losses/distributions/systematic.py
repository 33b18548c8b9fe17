"""Systematic sampling in two levels: block sums first, then tokens of the blocks hit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256
"""Tokens per block."""


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype of cumulative sums on a device: float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def systematic_tokens(
    probs: Float[Tensor, "N V"], num_draws: int, offset: Float[Tensor, "N 1"]
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Tokens that the points `(offset + j) / num_draws` fall on, ascending, and how many on each.

    Equal to `systematic_counts` up to rounding where a point falls between two tokens; a count of
    0 fills rows that hit fewer tokens than others. Memory: one block per draw, so use it where
    draws are few compared with the V / `BLOCK` blocks.

    Args:
        probs: Probabilities, up to a factor.
        offset: In [0, 1), one a row.
    """
    rows, size = probs.shape
    blocks = torch.nn.functional.pad(probs, (0, -size % BLOCK)).view(rows, -(-size // BLOCK), BLOCK)
    sums = blocks.sum(-1, dtype=offset.dtype)
    ends = sums.cumsum(-1)
    steps = torch.arange(num_draws, dtype=offset.dtype, device=probs.device)
    points = (steps + offset) / num_draws * ends[:, -1:]
    block = find(ends, points)
    points = points - (ends - sums).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))
    places = find(inside.cumsum(-1, dtype=offset.dtype), points[..., None]).squeeze(-1)
    return run_lengths(block * BLOCK + places)


def find(
    ends: Float[Tensor, "*rows n"], points: Float[Tensor, "*rows m"]
) -> Int[Tensor, "*rows m"]:
    """The first end beyond each point; rounding never leaves a point beyond them all."""
    zero = torch.zeros((), dtype=ends.dtype, device=ends.device)
    last = torch.nextafter(ends[..., -1:], zero)
    return torch.searchsorted(ends, torch.minimum(points, last), right=True)


def run_lengths(tokens: Int[Tensor, "N n"]) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Different tokens of ascending rows, and how often each occurs."""
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    runs = begins.long().cumsum(-1) - 1
    width = int(runs.max()) + 1 if tokens.numel() else 0
    ids, counts = (tokens.new_zeros(len(tokens), width) for _ in range(2))
    ids.scatter_(-1, runs, tokens)
    counts.scatter_add_(-1, runs, torch.ones_like(tokens))
    return ids, counts
