"""Top tokens exactly and draws from the tail: no bias, and what lies at either end of it."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses.distributions import DenseLogits, Samples, TopKSamples
from limbeck.losses.distributions.samples import systematic_counts
from limbeck.losses.divergences import divergences
from tests.laws.cases import SPECS, objective_of, over_paths, over_specs, random_logits
from tests.laws.test_samples import systematic_outcomes

close = torch.testing.assert_close
FORWARD_KL = {"type": "forward_kl"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@over_paths
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_the_mean_over_all_outcomes_is_forward_kl_with_its_gradient(path, temperature, num_draws):
    logits, student = random_logits(1, 6, 1.5), random_logits(1, 6, 1.5)
    made = TopKSamples.from_logits(logits, 2, num_draws, temperature)
    mass = (logits / temperature).softmax(-1).scatter(-1, made.ids, 0.0)[0]
    every = torch.arange(6)[None]
    value, gradient, whole = 0.0, torch.zeros(1, 6, dtype=torch.float64), 0.0
    for counts, probability in systematic_outcomes(mass / mass.sum(), num_draws):
        drawn = TopKSamples(
            made.ids,
            made.logprobs,
            made.tail_logprob,
            every,
            counts[None],
            num_draws,
            made.entropy_nats,
            temperature,
        )
        loss, slope = objective_of(student, drawn, FORWARD_KL, temperature, path)
        value, gradient = value + probability * loss, gradient + probability * slope
        whole += probability
    expected, slope = objective_of(student, DenseLogits(logits), FORWARD_KL, temperature, path)
    assert whole == pytest.approx(1)
    close(value, expected)
    close(gradient, slope)


@over_paths
def test_thousands_of_recordings_are_within_four_sigma_of_forward_kl(path):
    """Drawn at temperature 2, which is the one trained at."""
    rows, temperature = 4000, 2.0
    logits, student = random_logits(1, 30), random_logits(1, 30)
    drawn = TopKSamples.from_logits(logits.expand(rows, -1), 4, 3, temperature, generator=seeded(7))
    repeated = student.expand(rows, -1)
    loss, gradient = objective_of(repeated, drawn, FORWARD_KL, temperature, path)
    expected, slope = objective_of(student, DenseLogits(logits), FORWARD_KL, temperature, path)
    each = gradient * rows  # the loss is a mean over rows
    assert ((each.mean(0) - slope[0]).abs() <= 4 * each.std(0) / rows**0.5 + 1e-12).all()
    values = divergences.bind(FORWARD_KL, at="test")(*drawn.compare(repeated, temperature))
    values = (values + drawn.correction()) * temperature**2
    close(values.mean(), loss)
    assert abs(loss - expected) <= 4 * values.std() / rows**0.5 + 1e-12
    assert values.std() > 0


@over_paths
def test_without_kept_tokens_they_are_samples(path):
    logits, student = random_logits(7, 20), random_logits(7, 20)
    both = TopKSamples.from_logits(logits, 0, 9, 2.0, generator=seeded(1))
    drawn = Samples.from_logits(logits, 9, 2.0, generator=seeded(1))
    assert torch.equal(both.drawn_ids, drawn.ids)
    assert torch.equal(both.counts, drawn.counts)
    expected = objective_of(student, drawn, FORWARD_KL, 2.0, path)
    for a, b in zip(objective_of(student, both, FORWARD_KL, 2.0, path), expected, strict=True):
        close(a, b)


@over_paths
@pytest.mark.parametrize("k", [0, 3, 12])
def test_more_draws_converge_to_the_whole_distribution(path, k):
    """Twelve of twelve tokens kept: then no draw has a share, and few are as good as many."""
    logits, student = random_logits(5, 12), random_logits(5, 12)
    expected = objective_of(student, DenseLogits(logits), FORWARD_KL, 1.0, path)
    num_draws = 2 if k == 12 else 10**8
    drawn = TopKSamples.from_logits(logits, k, num_draws)
    assert (drawn.counts.sum(-1) == num_draws).all()
    for a, b in zip(objective_of(student, drawn, FORWARD_KL, 1.0, path), expected, strict=True):
        close(a, b, atol=1e-12 if k == 12 else 1e-6, rtol=1e-6)


def test_draws_are_from_the_tail_alone_and_shares_add_up_to_one():
    logits = random_logits(300, 40)
    drawn = TopKSamples.from_logits(logits, 6, 8, 2.0)
    real = drawn.counts > 0
    kept = (drawn.drawn_ids[:, :, None] == drawn.ids[:, None, :]).any(-1)
    assert not (kept & real).any()
    assert (drawn.counts.sum(-1) == 8).all()
    close(drawn.estimates().sum(-1), torch.ones(300).double())
    close(drawn.entropy(), DenseLogits(logits / 2.0).entropy())
    pair = drawn.compare(random_logits(300, 40), 2.0)
    for side in pair:
        close(side.exp().sum(-1), torch.ones(300).double())


def test_each_tail_token_is_drawn_as_often_as_its_share_rounded():
    logits = random_logits(50, 30, 1.0)
    drawn = TopKSamples.from_logits(logits, 5, 9, generator=seeded(5))
    tail = logits.softmax(-1).scatter(-1, drawn.ids, 0.0)
    offset = torch.rand((50, 1), dtype=torch.float64, generator=seeded(5))
    expected = systematic_counts(tail, 9, offset)
    counts = torch.zeros(50, 30, dtype=torch.long)
    counts.scatter_add_(-1, drawn.drawn_ids, drawn.counts)
    assert torch.equal(counts, expected)


@over_specs([spec for spec in SPECS if spec["type"] != "forward_kl"])
def test_other_divergences_are_refused_by_name(spec):
    drawn = TopKSamples.from_logits(random_logits(3, 6), 2, 4)
    with pytest.raises(
        ConfigError, match=f"TopKSamples supports forward_kl only.*'{spec['type']}'"
    ):
        objective_of(random_logits(3, 6), drawn, spec, 1.0)


@over_paths
def test_other_temperatures_are_refused(path):
    drawn = TopKSamples.from_logits(random_logits(3, 6), 2, 4, 2.0)
    with pytest.raises(ConfigError, match=r"drawn at temperature 2\.0.*compared at 1\.0"):
        objective_of(random_logits(3, 6), drawn, FORWARD_KL, 1.0, path)


def test_selecting_rows_selects_their_samples():
    logits, student = random_logits(9, 12), random_logits(9, 12)
    drawn = TopKSamples.from_logits(logits, 3, 5)
    for window in (slice(2, 6), torch.tensor([7, 0, 3])):
        part, whole = drawn.rows(window), drawn.compare(student, 1.0)
        for a, b in zip(part.compare(student[window], 1.0), whole, strict=True):
            close(a, b[window])
        close(part.correction(), drawn.correction()[window])
