"""Tokens that are probable enough: as a top-k where rows are even, and no outcome beyond them."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses.distributions import DenseLogits, TopK, UnevenTopK
from limbeck.losses.divergences import divergences
from tests.laws.cases import (
    F_DIVERGENCES,
    UNRANKED,
    objective_of,
    over,
    over_paths,
    over_specs,
    random_logits,
)

close = torch.testing.assert_close


@over_specs(UNRANKED)
@over_paths
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_even_rows_are_a_top_k(spec, path, temperature):
    logits, student = random_logits(6, 30), random_logits(6, 30)
    told = [1.0, 2.0]
    even = TopK.from_logits(logits, 5, told[0], told[1:])
    uneven = UnevenTopK.from_logits(logits, 5, 1e-30, told[0], told[1:])
    assert bool(uneven.kept.all())
    for ours, theirs in zip(
        objective_of(student, uneven, spec, temperature, path),
        objective_of(student, even, spec, temperature, path),
        strict=True,
    ):
        close(ours, theirs)


@over_specs(UNRANKED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_of_short_rows_does_not_change_the_loss(spec, temperature):
    """In either path: rows alone, of their own width, give what they give beside wider ones."""
    logits, student = random_logits(6, 30), random_logits(6, 30)
    whole = UnevenTopK.from_logits(logits, 20, 0.03, 1.0, [2.0])
    assert len(set(whole.kept.sum(-1).tolist())) > 1
    for path in ("closed form", "general"):
        together = objective_of(student, whole, spec, temperature, path)[1] * 6
        for row in range(6):
            few = slice(row, row + 1)
            alone = UnevenTopK.from_logits(logits[few], 20, 0.03, 1.0, [2.0])
            assert bool(alone.kept.all())
            _, gradient = objective_of(student[few], alone, spec, temperature, path)
            close(together[few], gradient)


@over(F_DIVERGENCES)
def test_keeping_more_tokens_raises_the_value_towards_the_exact_one(divergence):
    logits, student = random_logits(20, 40), random_logits(20, 40)
    dense = divergence(*DenseLogits(logits).compare(student, 1.0))
    before = torch.zeros_like(dense)
    for least in (0.5, 0.05, 0.005, 1e-9):
        kept = UnevenTopK.from_logits(logits, 40 - 1, least)
        value = divergence(*kept.compare(student, 1.0))
        assert bool((value <= dense + 1e-9).all())
        assert bool((value >= before - 1e-9).all())
        before = value


def test_the_most_probable_token_is_always_kept():
    kept = UnevenTopK.from_logits(torch.zeros(2, 30), 5, 0.9)
    assert kept.ids.shape == (2, 1)
    close(kept.tail_logprob.exp(), torch.full((2,), 29 / 30))


def test_a_temperature_that_was_not_recorded_is_refused():
    kept = UnevenTopK.from_logits(torch.randn(2, 30), 5, 0.01, 1.0, [2.0])
    kept.compare(torch.randn(2, 30), 2.0)
    with pytest.raises(ConfigError, match=r"recorded at temperature 1.0 and 2.0.*at 3.0"):
        kept.compare(torch.randn(2, 30), 3.0)


def test_all_divergences_are_served():
    assert UnevenTopK.serves is None
    assert divergences.names()
