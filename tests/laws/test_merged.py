"""Laws of distributions over outcomes that stand for tokens of two vocabularies."""

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses.distributions import (
    DenseLogits,
    LazyLogits,
    MergedOutcomes,
    OutcomeMap,
)
from limbeck.losses.divergences.base import divergences
from limbeck.losses.output_head import Head
from tests.laws.cases import (
    DIFFERENTIABLE,
    F_DIVERGENCES,
    KINKED,
    UNRANKED,
    objective_of,
    over_paths,
    over_specs,
    random_logits,
)

close = torch.testing.assert_close
STUDENT, TEACHER, OUTCOMES = 14, 11, 6
"""Two student ids and one teacher id are in no outcome."""


def unlike() -> OutcomeMap:
    student = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 1, 4, 4, 4, 6, 6])
    teacher = torch.tensor([5, 4, 3, 2, 1, 0, 0, 5, 5, 3, 6])
    return OutcomeMap(student, teacher, OUTCOMES)


def equal(size: int = 12) -> OutcomeMap:
    return OutcomeMap(torch.arange(size), torch.arange(size), size)


def signal(logits, outcomes=None) -> MergedOutcomes:
    return MergedOutcomes(DenseLogits(logits), outcomes or unlike())


def softmaxes(student, teacher, outcomes, temperature=1.0):
    """Summed and renormalised probabilities of the outcomes, the slow way."""
    found = []
    for logits, of in ((student, outcomes.student), (teacher, outcomes.teacher)):
        p = (logits / temperature).softmax(-1)
        sums = [p[:, of == c].sum(-1) for c in range(outcomes.num_outcomes)]
        found.append(torch.stack(sums, -1))
    return [each / each.sum(-1, keepdim=True) for each in found]


@over_specs(UNRANKED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@over_paths
def test_equal_vocabularies_give_the_exact_divergence(spec, temperature, path):
    student, teacher = random_logits(6, 12), random_logits(6, 12)
    exact = objective_of(student, DenseLogits(teacher), spec, temperature, path)
    found = objective_of(student, signal(teacher, equal()), spec, temperature, path)
    for a, b in zip(found, exact, strict=True):
        close(a, b, rtol=1e-12, atol=1e-12)


@over_specs(UNRANKED)
@over_paths
def test_a_permuted_vocabulary_gives_the_same_loss_and_zero_for_equal_models(spec, path):
    student, order = random_logits(6, 12), torch.randperm(12)
    outcomes = OutcomeMap(torch.arange(12), order, 12)
    loss, gradient = objective_of(student, signal(student[:, order], outcomes), spec, 2.0, path)
    close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    if spec["type"] not in KINKED:
        close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)
    teacher = random_logits(6, 12)
    exact = objective_of(student, DenseLogits(teacher), spec, 2.0, path)
    permuted = objective_of(student, signal(teacher[:, order], outcomes), spec, 2.0, path)
    for a, b in zip(permuted, exact, strict=True):
        close(a, b, rtol=1e-12, atol=1e-12)


@over_specs(UNRANKED)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@over_paths
def test_any_divergence_is_that_of_the_summed_probabilities(spec, temperature, path):
    student, teacher = random_logits(6, STUDENT), random_logits(6, TEACHER)
    found, _ = objective_of(student, signal(teacher), spec, temperature, path)
    q, p = softmaxes(student, teacher, unlike(), temperature)
    wanted = divergences.bind(spec, at="test")(q.log(), p.log()).mean() * temperature**2
    close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_forward_kl_is_q_times_one_less_the_ratio():
    student, teacher, outcomes = random_logits(6, STUDENT), random_logits(6, TEACHER), unlike()
    q, p = softmaxes(student, teacher, outcomes)
    own = student.softmax(-1)
    covered = outcomes.student < OUTCOMES
    own = own * covered / (own * covered).sum(-1, keepdim=True)
    ratio = torch.nn.functional.pad(p / q, (0, 1))[:, outcomes.student]
    wanted = own * (1 - ratio)
    for path in ("closed form", "general"):
        _, gradient = objective_of(student, signal(teacher), {"type": "forward_kl"}, path=path)
        close(gradient * 6, wanted, rtol=0, atol=1e-14)
        assert gradient[:, ~covered].abs().max() < 1e-15


@over_specs(DIFFERENTIABLE)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_the_closed_form_equals_autograd(spec, temperature):
    if spec not in UNRANKED:
        pytest.skip("ranks outcomes")
    student, teacher = random_logits(6, STUDENT), random_logits(6, TEACHER)
    closed, general = (
        objective_of(student, signal(teacher), spec, temperature, path)
        for path in ("closed form", "general")
    )
    for a, b in zip(closed, general, strict=True):
        close(a, b, rtol=1e-12, atol=1e-12)


@over_specs(F_DIVERGENCES)
def test_merging_tokens_can_only_shrink_an_f_divergence(spec):
    student, teacher = random_logits(6, 12), random_logits(6, 12)
    of = torch.randint(4, (12,))
    exact, _ = objective_of(student, DenseLogits(teacher), spec)
    found, _ = objective_of(student, signal(teacher, OutcomeMap(of, of, 4)), spec)
    assert found <= exact + 1e-12


def test_ids_in_no_outcome_are_left_out_of_the_softmax():
    student, teacher, outcomes = random_logits(6, STUDENT), random_logits(6, TEACHER), unlike()
    of_s, of_t = outcomes.student < OUTCOMES, outcomes.teacher < OUTCOMES
    cut = OutcomeMap(outcomes.student[of_s], outcomes.teacher[of_t], OUTCOMES)
    whole = objective_of(student, signal(teacher), {"type": "forward_kl"}, 2.0)
    less = objective_of(
        student[:, of_s], signal(teacher[:, of_t], cut), {"type": "forward_kl"}, 2.0
    )
    close(less[0], whole[0])
    close(less[1], whole[1][:, of_s])


@over_paths
def test_an_outcome_far_below_the_smallest_float_still_has_its_gradient(path):
    """Each sum is taken relative to its largest term; e^-200 is 0 in float32."""
    student = torch.zeros(2, STUDENT)
    student[:, unlike().student == 4] = -200.0
    teacher = torch.zeros(2, TEACHER)
    found = signal(teacher).compare(student, 1.0)
    assert (found.student[:, 4] + 200).abs().max() < 5
    loss, gradient = objective_of(student, signal(teacher), {"type": "forward_kl"}, path=path)
    assert loss.isfinite()
    assert (gradient[:, unlike().student == 4].sum(-1) < -1e-3).all()


def test_a_lazy_teacher_of_another_width_gives_the_loss_of_its_logits():
    hidden, weight = torch.randn(9, 5).double(), torch.randn(TEACHER, 5).double()
    lazy = MergedOutcomes(LazyLogits(hidden, Head(weight)), unlike())
    student = random_logits(9, STUDENT)
    for path in ("closed form", "general"):
        found = objective_of(student, lazy, {"type": "forward_kl"}, 2.0, path)
        wanted = objective_of(
            student, signal(hidden @ weight.t()), {"type": "forward_kl"}, 2.0, path
        )
        for a, b in zip(found, wanted, strict=True):
            close(a, b)


def test_rows_and_concatenation_keep_the_outcomes():
    whole = signal(random_logits(5, TEACHER))
    again = MergedOutcomes.cat([whole.rows(slice(0, 2)), whole.rows(torch.tensor([2, 3, 4]))])
    assert torch.equal(again.at(1.0), whole.at(1.0))
    close(whole.entropy(), -(whole.at(1.0).exp() * whole.at(1.0)).sum(-1))


def test_a_divergence_that_sorts_tokens_is_refused():
    with pytest.raises(ConfigError, match="held as MergedOutcomes"):
        objective_of(
            random_logits(2, STUDENT), signal(random_logits(2, TEACHER)), {"type": "adaptive_kl"}
        )
