"""Inside autocast the head's products have autocast's dtype, and all else at least float32."""

import pytest
import torch

from limbeck.layer_map import LayerMap
from limbeck.losses import (
    DistillationLoss,
    Head,
    Objective,
    PairShapes,
    StudentView,
    TeacherSignal,
    WeightedTerm,
)
from limbeck.losses.distributions import LazyLogits
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm
from limbeck.losses.terms.relations import relations

TOKENS, VOCABULARY, WIDTH = 90, 64, 16
close = torch.testing.assert_close


def inputs(dtype=torch.float32):
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    teacher = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(VOCABULARY, WIDTH).to(dtype)
    return hidden, weight, teacher, torch.randint(VOCABULARY, (TOKENS,))


def taken(dtype, divergence, transform, *, is_autocast):
    hidden, weight, teacher, targets = inputs(dtype)
    terms = [
        WeightedTerm("soft", 0.7, DivergenceTerm(divergence=divergence, temperature=2.0)),
        WeightedTerm("hard", 0.3, CrossEntropyTerm()),
    ]
    signal = TeacherSignal.from_distribution(LazyLogits(teacher[0], Head(teacher[1])))
    view = StudentView(hidden, Head(weight, None, transform), {}, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        loss, shares = Objective(terms)(view, signal, torch.tensor(TOKENS))
    return loss, shares, torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "todi"])
@pytest.mark.parametrize("transform", [None, torch.clone])
def test_autocast_is_what_inputs_in_its_dtype_give(divergence, transform):
    loss, shares, gradients = taken(torch.float32, divergence, transform, is_autocast=True)
    expected = taken(torch.bfloat16, divergence, transform, is_autocast=False)
    assert loss.dtype == torch.float32
    close(loss, expected[0], rtol=1e-6, atol=0)
    close(shares, expected[1], rtol=1e-6, atol=0)
    for a, b in zip(gradients, expected[2], strict=True):
        assert a.dtype == torch.float32
        close(a, b.float(), rtol=0, atol=0)


def test_float64_stays_float64_inside_autocast():
    inside = taken(torch.float64, "forward_kl", None, is_autocast=True)
    outside = taken(torch.float64, "forward_kl", None, is_autocast=False)
    close(inside, outside, rtol=0, atol=0)


def test_state_terms_ignore_autocast():
    hidden, weight, (states, _), targets = inputs()
    term = relations(PairShapes(1, 1, WIDTH, WIDTH, LayerMap.uniform(1, 1)))
    segments = torch.zeros(TOKENS, dtype=torch.long)
    view = StudentView(hidden, Head(weight), {0: hidden}, targets, segments=segments)
    signal, objective = TeacherSignal(layer_hidden={0: states}), None
    objective = Objective([WeightedTerm("relations", 1.0, term)])
    expected, _ = objective(view, signal, torch.tensor(TOKENS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = objective(view, signal, torch.tensor(TOKENS))
    close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "todi"])
def test_a_loss_from_logits_ignores_autocast(divergence):
    loss = DistillationLoss(divergence=divergence)
    logits, teacher = torch.randn(2, 9, VOCABULARY), torch.randn(2, 9, VOCABULARY)
    labels = torch.randint(VOCABULARY, (2, 9))
    expected = loss.from_logits(logits, labels, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(loss.from_logits(logits, labels, teacher), expected, rtol=0, atol=0)
