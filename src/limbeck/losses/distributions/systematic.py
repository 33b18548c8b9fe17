"""Systematic draws that look at block sums first, and at tokens only in the blocks hit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256
"""Tokens whose probabilities are added up before any is looked at alone."""


def systematic_tokens(
    mass: Float[Tensor, "N V"], num_draws: int, offset: Float[Tensor, "N 1"]
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Tokens that the points `(offset + j) / num_draws` fall on, ascending, and how many on each.

    As `systematic_counts` says, up to rounding where a point falls between two tokens; a count of
    0 fills rows that hit fewer tokens than others. Takes a block's memory for every draw, so is for
    draws that are few beside the V / `BLOCK` blocks.

    Args:
        mass: Probabilities, up to a factor.
        num_draws: Number of points.
        offset: In [0, 1), one a row.
    """
    rows, size = mass.shape
    blocks = torch.nn.functional.pad(mass, (0, -size % BLOCK)).view(rows, -(-size // BLOCK), BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    steps = torch.arange(num_draws, dtype=torch.float64, device=mass.device)
    points = (steps + offset) / num_draws * ends[:, -1:]
    block = find(ends, points)
    points = points - (ends - sums).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))
    places = find(inside.cumsum(-1, dtype=torch.float64), points[..., None]).squeeze(-1)
    return run_lengths(block * BLOCK + places)


def find(
    ends: Float[Tensor, "*rows n"], points: Float[Tensor, "*rows m"]
) -> Int[Tensor, "*rows m"]:
    """The first end beyond each point; rounding never leaves a point beyond them all."""
    zero = torch.zeros((), dtype=ends.dtype, device=ends.device)
    last = torch.nextafter(ends[..., -1:], zero)
    return torch.searchsorted(ends, torch.minimum(points, last), right=True)


def run_lengths(tokens: Int[Tensor, "N n"]) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Different tokens of ascending rows, and how often each stands there."""
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    runs = begins.long().cumsum(-1) - 1
    width = int(runs.max()) + 1 if tokens.numel() else 0
    ids, counts = (tokens.new_zeros(len(tokens), width) for _ in range(2))
    ids.scatter_(-1, runs, tokens)
    counts.scatter_add_(-1, runs, torch.ones_like(tokens))
    return ids, counts
