"""Draws by block sums are the draws by looking at every token."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.losses.distributions import Samples, TopKSamples, samples, top_k_samples
from limbeck.losses.distributions.samples import systematic_counts
from limbeck.losses.distributions.systematic import BLOCK, systematic_tokens, widest_float


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5000])
@pytest.mark.parametrize("num_draws", [1, 10, 333])
def test_drawing_by_block_sums_finds_the_same_tokens(size, num_draws):
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


@pytest.mark.parametrize("size", [40, 5000])
def test_a_device_without_float64_is_sampled_in_float32(monkeypatch, size):
    """Both ways of drawing, and those from a tail: no float64 tensor exists."""
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == torch.float64
    for module in (samples, top_k_samples):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    logits = 3 * torch.randn(20, size)
    dtypes = Dtypes()
    with dtypes:
        alone = Samples.from_logits(logits, 9)
        mixed = TopKSamples.from_logits(logits, 4, 9)
    assert torch.float64 not in dtypes.seen
    for counts in (alone.counts, mixed.counts):
        assert (counts.sum(-1) == 9).all()


class Dtypes(TorchDispatchMode):
    """Records the dtypes of everything torch computes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        self.seen |= {each.dtype for each in outputs if isinstance(each, torch.Tensor)}
        return result
