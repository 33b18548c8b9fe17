"""A gradient is the divergence it is named after, differentiated."""

import pytest
import torch

from limbeck.losses.distributions import DenseLogits, TopK
from limbeck.losses.divergences import divergences
from limbeck.losses.divergences.base import Outcomes, gradients
from tests.laws.cases import SPECS, objective_of, over_specs, random_logits, random_logp

WITH_GRADIENT = [spec for spec in SPECS if spec["type"] in gradients.names()]


def evaluate(spec, student, teacher):
    """Value, and gradient with respect to logits, by the gradient."""
    parts = [student, teacher, student.exp(), teacher.exp(), torch.full_like(student, torch.nan)]
    outcomes = Outcomes(*(part.clone() for part in parts))
    probs = outcomes.student_prob.clone()
    value = gradients.bind(spec, at="test")(outcomes)
    assert torch.equal(outcomes.student_prob, probs)
    gradient = outcomes.teacher_prob
    return value, gradient - probs * gradient.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", gradients.names())
def test_a_gradient_takes_the_options_of_its_divergence(name):
    assert name in divergences.names()
    ours, theirs = gradients.options(name), divergences.options(name)
    assert list(ours) == list(theirs)
    for option, (_, parameter) in ours.items():
        assert parameter.default == theirs[option][1].default


@over_specs(WITH_GRADIENT)
def test_gradient_equals_autograd(spec):
    logits, teacher = random_logp(32, 9).requires_grad_(), random_logp(32, 9)
    expected = divergences.bind(spec, at="test")(logits.log_softmax(-1), teacher)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, got = evaluate(spec, logits.detach().log_softmax(-1), teacher)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(got, gradient)


@over_specs(WITH_GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_impossible_outcomes_is_finite_and_adds_nothing(spec, dtype):
    student, teacher = random_logp(8, 6).to(dtype), random_logp(8, 6).to(dtype)
    never = torch.full((8, 2), -1e4, dtype=dtype)
    expected, expected_gradient = evaluate(spec, student, teacher)
    value, gradient = evaluate(
        spec, torch.cat([student, never], -1), torch.cat([teacher, never], -1)
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :6], expected_gradient)
    assert (gradient[:, 6:] == 0).all()


@over_specs(WITH_GRADIENT)
def test_gradient_of_opposite_certainties_is_finite(spec):
    student = torch.tensor([[0.0, -200.0, -1e4]])
    teacher = torch.tensor([[-200.0, 0.0, -1e4]])
    value, gradient = evaluate(spec, student, teacher)
    expected = divergences.bind(spec, at="test")(student, teacher)
    torch.testing.assert_close(value, expected)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["total_variation", "lk_kl"])
def test_sums_over_a_large_vocabulary_are_accurate_in_float32(name):
    logits = 2 * torch.randn(2, 2, 151_936)
    student, teacher = logits.log_softmax(-1)
    exact = logits.double().log_softmax(-1)
    expected = divergences.bind({"type": name}, at="test")(*exact)
    value, _ = evaluate({"type": name}, student, teacher)
    # Adding one by one in float32 is 1e-4 off; the order of a vectorised sum depends on the CPU.
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


@over_specs(WITH_GRADIENT)
@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_both_paths_give_a_gradient_to_tokens_the_student_excludes(spec, kind):
    """Gaps beyond the floor of -10,000 nats: the gradient of forward KL is still q - p."""
    student, teacher = random_logits(4, 6), random_logits(4, 6)
    student[:, 2] -= 30_000
    held = DenseLogits(teacher) if kind == "dense" else TopK.from_logits(teacher, 4)
    loss, gradient = objective_of(student, held, spec)
    general, expected = objective_of(student, held, spec, path="general")
    torch.testing.assert_close(general, loss)
    torch.testing.assert_close(expected, gradient)
    if spec["type"] == "forward_kl" and kind == "dense":
        pull = student.softmax(-1) - teacher.softmax(-1)
        torch.testing.assert_close(4 * gradient, pull)
