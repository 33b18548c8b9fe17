"""Tokens drawn from a teacher: no bias, in value and in gradient, by counting and by chance."""

import itertools
import math

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses.distributions import DenseLogits, Samples
from limbeck.losses.distributions.samples import systematic_counts
from limbeck.losses.divergences import divergences
from tests.laws.cases import SPECS, objective_of, over_paths, over_specs, random_logits

close = torch.testing.assert_close
FORWARD_KL = {"type": "forward_kl"}


def from_counts(counts: torch.Tensor, logits: torch.Tensor, temperature: float) -> Samples:
    """What one outcome of the draws would have been stored as."""
    logp = (logits / temperature).log_softmax(-1)
    ids = torch.arange(logits.shape[-1]).expand_as(counts)
    entropy = -(logp.exp() * logp).sum(-1)
    return Samples(ids, counts, int(counts[0].sum()), entropy, temperature)


def independent_outcomes(mass: torch.Tensor, num_draws: int):
    """Every sequence of draws: its counts and its probability."""
    size = len(mass)
    for drawn in itertools.product(range(size), repeat=num_draws):
        counts = torch.bincount(torch.tensor(drawn), minlength=size)
        yield counts, math.prod(mass[token].item() for token in drawn)


def systematic_outcomes(mass: torch.Tensor, num_draws: int):
    """Every stretch of offsets on which the counts are the same: counts and length."""
    turns = (mass.cumsum(-1) * num_draws).frac().tolist()
    for low, high in itertools.pairwise(sorted({0.0, *turns, 1.0})):
        offset = torch.tensor([[(low + high) / 2]], dtype=torch.float64)
        yield systematic_counts(mass[None], num_draws, offset)[0], high - low


OUTCOMES = {"independent": independent_outcomes, "systematic": systematic_outcomes}
over_outcomes = pytest.mark.parametrize("outcomes", OUTCOMES.values(), ids=OUTCOMES.keys())


@over_outcomes
@over_paths
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_draws", [1, 2, 4])
def test_the_mean_over_all_outcomes_is_forward_kl_with_its_gradient(
    outcomes, path, temperature, num_draws
):
    logits, student = random_logits(1, 4, 1.5), random_logits(1, 4, 1.5)
    mass = (logits / temperature).softmax(-1)[0]
    value, gradient, whole = 0.0, torch.zeros(1, 4, dtype=torch.float64), 0.0
    for counts, probability in outcomes(mass, num_draws):
        drawn = from_counts(counts[None], logits, temperature)
        loss, slope = objective_of(student, drawn, FORWARD_KL, temperature, path)
        value, gradient = value + probability * loss, gradient + probability * slope
        whole += probability
    expected, slope = objective_of(student, DenseLogits(logits), FORWARD_KL, temperature, path)
    assert whole == pytest.approx(1)
    close(value, expected)
    close(gradient, slope)


@over_outcomes
def test_shares_have_the_probabilities_as_mean_and_the_variance_they_should(outcomes):
    mass = random_logits(1, 4, 1.0).softmax(-1)[0]
    mean, square = torch.zeros(4).double(), torch.zeros(4).double()
    for counts, probability in outcomes(mass, 3):
        mean += probability * counts / 3
        square += probability * (counts / 3) ** 2
    close(mean, mass)
    variance = square - mean**2
    if outcomes is independent_outcomes:
        close(variance, mass * (1 - mass) / 3)
    else:
        left = (3 * mass).frac()
        close(variance, left * (1 - left) / 9)


def test_systematic_counts_are_rounded_up_or_down():
    mass = random_logits(500, 40).softmax(-1)
    counts = systematic_counts(mass, 25, torch.rand(500, 1, dtype=torch.float64))
    assert (counts.sum(-1) == 25).all()
    assert (counts >= (25 * mass).floor() - 1e-9).all()
    assert (counts <= (25 * mass).ceil() + 1e-9).all()


@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn(offset):
    mass = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    counts = systematic_counts(mass, 7, torch.tensor([[offset]], dtype=torch.float64))
    assert counts.sum() == 7
    assert (counts[mass == 0] == 0).all()


@pytest.mark.parametrize("systematic", [True, False])
@over_paths
def test_a_thousand_recordings_are_within_four_sigma_of_forward_kl(systematic, path):
    rows, temperature = 4000, 1.5
    logits, student = random_logits(1, 9), random_logits(1, 9)
    generator = torch.Generator().manual_seed(7)
    many = logits.expand(rows, -1)
    drawn = Samples.from_logits(many, 5, temperature, systematic=systematic, generator=generator)
    repeated = student.expand(rows, -1)
    loss, gradient = objective_of(repeated, drawn, FORWARD_KL, temperature, path)
    expected, slope = objective_of(student, DenseLogits(logits), FORWARD_KL, temperature, path)
    each = gradient * rows  # the loss is a mean over rows
    error = each.mean(0) - slope[0]
    sigma = each.std(0) / rows**0.5
    assert (error.abs() <= 4 * sigma + 1e-12).all()
    pair = drawn.compare(repeated, temperature)
    values = divergences.bind(FORWARD_KL, at="test")(*pair) + drawn.correction()
    values = values * temperature**2
    close(values.mean(), loss)
    assert abs(loss - expected) <= 4 * values.std() / rows**0.5 + 1e-12


def test_a_recording_holds_its_draws_and_the_teachers_entropy():
    logits = random_logits(20, 30)
    for systematic in (True, False):
        drawn = Samples.from_logits(logits, 12, systematic=systematic)
        assert (drawn.counts.sum(-1) == 12).all()
        for ids, counts in zip(drawn.ids.tolist(), drawn.counts.tolist(), strict=True):
            real = [token for token, count in zip(ids, counts, strict=True) if count]
            assert len(set(real)) == len(real)
        close(drawn.entropy(), DenseLogits(logits).entropy())


def test_the_same_generator_draws_the_same():
    logits = random_logits(5, 30)
    first, again, other = (
        Samples.from_logits(logits, 9, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.counts, again.counts)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


@over_paths
def test_rows_that_drew_fewer_tokens_are_filled_with_nothing(path):
    """The fill's id may even be one that was drawn."""
    logits, student = random_logits(1, 6), random_logits(1, 6)
    entropy = DenseLogits(logits).entropy()
    exact = Samples(torch.tensor([[2, 4]]), torch.tensor([[3, 1]]), 4, entropy)
    filled = Samples(torch.tensor([[2, 4, 2, 0]]), torch.tensor([[3, 1, 0, 0]]), 4, entropy)
    expected = objective_of(student, exact, FORWARD_KL, 1.0, path)
    for a, b in zip(objective_of(student, filled, FORWARD_KL, 1.0, path), expected, strict=True):
        close(a, b)
    likelihood = student.log_softmax(-1)[0, [2, 4]] @ torch.tensor([0.75, 0.25]).double()
    close(expected[0], -likelihood - entropy[0])


@over_specs([spec for spec in SPECS if spec["type"] != "forward_kl"])
@over_paths
def test_other_divergences_are_refused_by_name(spec, path):
    drawn = Samples.from_logits(random_logits(3, 6), 4)
    with pytest.raises(ConfigError, match=f"Samples supports forward_kl only.*'{spec['type']}'"):
        objective_of(random_logits(3, 6), drawn, spec, 1.0, path)


@over_paths
def test_other_temperatures_are_refused(path):
    drawn = Samples.from_logits(random_logits(3, 6), 4, 2.0)
    with pytest.raises(ConfigError, match=r"drawn at temperature 2\.0.*compared at 1\.0"):
        objective_of(random_logits(3, 6), drawn, FORWARD_KL, 1.0, path)


def test_selecting_rows_selects_their_samples():
    logits, student = random_logits(9, 12), random_logits(9, 12)
    drawn = Samples.from_logits(logits, 5)
    for window in (slice(2, 6), torch.tensor([7, 0, 3])):
        part, whole = drawn.rows(window), drawn.compare(student, 1.0)
        for a, b in zip(part.compare(student[window], 1.0), whole, strict=True):
            close(a, b[window])
        close(part.correction(), drawn.correction()[window])
