"""Draws by block sums are the draws by looking at every token."""

import pytest
import torch

from limbeck.losses.distributions import Samples
from limbeck.losses.distributions.samples import systematic_counts
from limbeck.losses.distributions.systematic import BLOCK, systematic_tokens


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5000])
@pytest.mark.parametrize("num_draws", [1, 10, 333])
def test_block_sums_find_the_tokens_that_all_sums_find(size, num_draws):
    mass = (3 * torch.randn(40, size, dtype=torch.float64)).softmax(-1)
    offset = torch.rand(40, 1, dtype=torch.float64)
    ids, counts = systematic_tokens(mass, num_draws, offset)
    found = torch.zeros_like(mass, dtype=torch.long).scatter_add(-1, ids, counts)
    assert torch.equal(found, systematic_counts(mass, num_draws, offset))


@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_impossible_token_is_never_drawn(offset, dtype):
    """Not even by rounding: at both ends, between blocks, and in a whole empty block."""
    for possible in ([3], [0], [4 * BLOCK - 1], [BLOCK, 3 * BLOCK - 1], [5, 6, 7]):
        mass = torch.zeros(1, 4 * BLOCK, dtype=dtype)
        mass[0, possible] = 1 / 3
        start = torch.tensor([[offset]], dtype=torch.float64)
        ids, counts = systematic_tokens(mass, 97, start)
        assert set(ids[counts > 0].tolist()) <= set(possible)
        assert int(counts.sum()) == 97


def test_many_draws_take_no_more_memory_than_the_row():
    """A block for each of ten million draws would be twenty gigabytes a row."""
    samples = Samples.from_logits(torch.randn(2, 3000), 10_000_000)
    assert samples.counts.sum(-1).tolist() == [10_000_000] * 2


def test_no_rows_give_no_draws():
    ids, counts = systematic_tokens(torch.zeros(0, 9), 5, torch.zeros(0, 1, dtype=torch.float64))
    assert ids.shape == counts.shape == (0, 0)
