"""Every form of teacher distribution must agree with the dense one where it knows as much."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses import Head
from limbeck.losses.distributions import DenseLogits, LazyLogits, TopK


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_pairs_are_finite_and_sum_to_one(temperature):
    student, teacher = 5 * torch.randn(16, 32), 5 * torch.randn(16, 32)
    student[:, 30:] = teacher[:, 29:] = -torch.inf
    for distribution in (
        DenseLogits(teacher),
        LazyLogits(torch.randn(16, 8), Head(torch.randn(32, 8))),
        TopK.from_logits(teacher, 4, temperature),
    ):
        for logp in distribution.compare(student, temperature):
            assert torch.isfinite(logp).all()
            torch.testing.assert_close(logp.exp().sum(-1), torch.ones(16))


def test_a_head_applies_product_bias_and_transform():
    hidden, weight, bias = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    expected = torch.tanh(hidden @ weight.t() + bias)
    torch.testing.assert_close(Head(weight, bias, torch.tanh)(hidden), expected)
    torch.testing.assert_close(Head(weight)(hidden), hidden @ weight.t())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forms_agree_on_rows_taken_before_or_after(temperature):
    logits, student, window = torch.randn(9, 12), torch.randn(9, 12), slice(3, 7)
    for distribution in (
        DenseLogits(logits),
        LazyLogits(logits, Head(torch.eye(12))),
        TopK.from_logits(logits, 4, temperature),
    ):
        whole = distribution.compare(student, temperature)
        part = distribution.rows(window).compare(student[window], temperature)
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[window])


def test_the_tail_of_a_top_k_is_the_probability_of_all_others_at_its_temperature():
    logits = torch.randn(6, 20, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        kept = TopK.from_logits(logits, 7, temperature)
        rest = 1 - kept.logprobs.exp().sum(-1)
        torch.testing.assert_close(kept.tail_logprob.exp(), rest)


def test_teachers_carry_no_gradient_and_bfloat16_becomes_float32():
    logits = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    student = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    for distribution in (DenseLogits(logits), TopK.from_logits(logits, 3)):
        pair = distribution.compare(student, 1.0)
        assert pair.student.requires_grad
        assert not pair.teacher.requires_grad
        assert pair.student.dtype == pair.teacher.dtype == torch.float32


def test_top_k_refuses_a_temperature_it_was_not_recorded_at():
    top_k = TopK.from_logits(torch.randn(2, 8), 3)
    with pytest.raises(
        ConfigError, match=r"recorded at temperature 1\.0, so it cannot be compared at 2\.0"
    ):
        top_k.compare(torch.randn(2, 8), 2.0)
