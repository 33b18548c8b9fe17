"""Top-k: a tail for each temperature, and the bias without one."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses.distributions import DenseLogits, TopK
from limbeck.losses.distributions.top_k import log_one_minus_exp
from tests.laws.cases import (
    RENORMALISED,
    UNRANKED,
    objective_of,
    over_paths,
    over_specs,
    random_logits,
    renormalised,
)

close = torch.testing.assert_close
FORWARD_KL = {"type": "forward_kl"}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.4, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_tail_stored_for_a_temperature_equals_a_recording_at_it(temperature, k):
    logits = random_logits(8, 20)
    recorded = TopK.from_logits(logits, k, 1.4, further=[0.5, 1.0, 2.0, 4.0])
    close(recorded.at(temperature), TopK.from_logits(logits, k, temperature).at(temperature))


@over_specs(UNRANKED)
@over_paths
def test_training_at_a_further_temperature_is_the_same(spec, path):
    logits, student = random_logits(6, 12), random_logits(6, 12)
    recorded = TopK.from_logits(logits, 4, 1.0, further=[2.0])
    expected = objective_of(student, TopK.from_logits(logits, 4, 2.0), spec, 2.0, path)
    for a, b in zip(objective_of(student, recorded, spec, 2.0, path), expected, strict=True):
        close(a, b)


def test_temperatures_without_a_tail_are_refused():
    recorded = TopK.from_logits(random_logits(2, 8), 3, 1.0, further=[2.0])
    with pytest.raises(ConfigError, match=r"temperature 1\.0 and 2\.0, so .* compared at 3\.0"):
        recorded.compare(random_logits(2, 8), 3.0)


def test_rows_keep_every_tail():
    logits, student = random_logits(9, 12), random_logits(9, 12)
    recorded = TopK.from_logits(logits, 4, further=[2.0])
    for window in (slice(2, 6), torch.tensor([7, 0, 3])):
        whole = recorded.compare(student, 2.0)
        part = recorded.rows(window).compare(student[window], 2.0)
        for a, b in zip(part, whole, strict=True):
            close(a, b[window])


def test_log_one_minus_exp_is_accurate_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -0.5, -0.7, -3.0, -50.0, -1e4], dtype=torch.float64)
    expected = torch.tensor(
        [
            -27.631021115929048,
            -6.908255237315471,
            -0.9327521295671886,
            -0.6863410028083852,
            -0.05106918094270159,
            -1.9287498479639178e-22,
            0.0,
        ],
        dtype=torch.float64,
    )
    close(log_one_minus_exp(x), expected)
    assert torch.isfinite(log_one_minus_exp(torch.zeros(1)))


@over_paths
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalised_is_biased_as_its_name_says(path, temperature):
    """A student equal to its teacher pays -log Z, and is pulled away from it."""
    logits = random_logits(6, 12)
    teacher = renormalised(logits, 4, temperature)
    loss, gradient = objective_of(logits, teacher, FORWARD_KL, temperature, path)
    mass = (logits / temperature).softmax(-1)
    top = mass.topk(4)
    kept = top.values.sum(-1)
    close(loss, -kept.log().mean() * temperature**2)
    target = torch.zeros_like(mass).scatter(-1, top.indices, top.values / kept[:, None])
    close(gradient, (mass - target) * temperature / 6)
    assert (gradient.norm(dim=-1) > 1e-6).all()


@over_paths
def test_unnormalised_loss_is_kept_probability_times_renormalised_plus_its_log(path):
    """The identity that ties the two common sparse losses together."""
    logits, student = random_logits(1, 12), random_logits(1, 12)
    loss, gradient = objective_of(student, renormalised(logits, 4), FORWARD_KL, 1.0, path)
    p, logq = logits.softmax(-1), student.log_softmax(-1)
    top = p.topk(4)
    kept = top.values.sum()
    plain = (top.values * (top.values.log() - logq.gather(-1, top.indices))).sum()
    close(plain, kept * (loss + kept.log()))
    one = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    close(kept * gradient, kept * logq.exp() - one)


@over_paths
def test_renormalised_with_all_tokens_is_the_whole_distribution(path):
    logits, student = random_logits(4, 9), random_logits(4, 9)
    for name in RENORMALISED:
        spec = {"type": name}
        expected = objective_of(student, DenseLogits(logits), spec, 1.0, path)
        got = objective_of(student, renormalised(logits, 9), spec, 1.0, path)
        for a, b in zip(got, expected, strict=True):
            close(a, b)
