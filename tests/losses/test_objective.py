"""A step's loss and gradient must not depend on how the step was cut up."""

import itertools

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import (
    Head,
    Objective,
    PairShapes,
    StudentView,
    TeacherSignal,
    WeightedTerm,
    build_objective,
)
from limbeck.losses.distributions import DenseLogits, LazyLogits, TopK
from limbeck.losses.divergences import divergences

close = torch.testing.assert_close
TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 150, 2048, 8, 12
SHAPES = PairShapes(2, 4, WIDTH, TEACHER_WIDTH, LayerMap.uniform(2, 4))


def soft_cap(product):
    return 5 * torch.tanh(product / 5)


class Pair:
    """A student's and a teacher's answers to one batch, and the parameters behind them."""

    def __init__(self, transform=None, is_sparse: bool = False) -> None:
        torch.manual_seed(1)
        double = torch.float64
        self.hidden = torch.randn(TOKENS, WIDTH, dtype=double, requires_grad=True)
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=double, requires_grad=True)
        self.layers = torch.randn(2, TOKENS, WIDTH, dtype=double, requires_grad=True)
        self.teacher_hidden = torch.randn(TOKENS, TEACHER_WIDTH, dtype=double)
        self.teacher_weight = torch.randn(VOCABULARY, TEACHER_WIDTH, dtype=double)
        self.teacher_layers = torch.randn(4, TOKENS, TEACHER_WIDTH, dtype=double)
        self.targets = torch.randint(VOCABULARY, (TOKENS,))
        self.transform, self.is_sparse = transform, is_sparse

    def cut(self, window: slice) -> tuple[StudentView, TeacherSignal]:
        layers = dict(enumerate(self.layers[:, window]))
        head = Head(self.weight, None, self.transform)
        view = StudentView(self.hidden[window], head, layers, self.targets[window])
        distribution = LazyLogits(self.teacher_hidden[window], Head(self.teacher_weight))
        if self.is_sparse:
            logits = distribution.head(distribution.hidden)
            distribution = TopK.from_logits(logits, 8, 2.0)
        layers = {layer: self.teacher_layers[layer, window] for layer in (0, 3)}
        return view, TeacherSignal.from_distribution(distribution, layers)


def objective(divergence="forward_kl", budget: int = 256, alpha: float = 0.7) -> Objective:
    torch.manual_seed(2)
    config = ObjectiveConfig(
        alpha=alpha,
        temperature=2.0,
        divergence=divergence,
        extra=({"type": "hidden_state", "weight": 0.1},),
    )
    return build_objective(config, SHAPES, head_budget_mb=budget).double()


def take(chosen: Objective, pair: Pair, windows: list[slice], step_tokens: int = TOKENS):
    """Summed loss, summed shares and gradients after the micro-batches of a step."""
    total, shares = 0.0, {}
    for window in windows:
        loss, parts = chosen(*pair.cut(window), torch.tensor(step_tokens))
        loss.backward()
        total += loss.detach()
        shares = {name: shares.get(name, 0) + part for name, part in parts.items()}
    leaves = [pair.hidden, pair.weight, pair.layers, *chosen.parameters()]
    return total, shares, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("cuts", [[0, 150], [0, 1, 150], [0, 70, 70, 130, 150]])
@pytest.mark.parametrize("budget", [1, 256])
@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "todi"])
def test_a_step_does_not_depend_on_its_micro_batches(
    cuts, budget, transform, is_sparse, divergence
):
    """Neither on micro-batches, one of them empty, nor on chunks (64 tokens or all)."""
    loss, shares, gradients = take(
        objective(divergence), Pair(transform, is_sparse), [slice(0, TOKENS)]
    )
    windows = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    cut = take(objective(divergence, budget), Pair(transform, is_sparse), windows)
    close(cut[0], loss)
    assert list(shares) == ["divergence", "cross_entropy", "hidden_state"]
    for name in shares:
        close(cut[1][name], shares[name])
    for got, expected in zip(cut[2], gradients, strict=True):
        assert expected.abs().max() > 0
        close(got, expected)


def test_loss_is_the_weighted_sum_of_its_shares():
    loss, shares, _ = take(objective(), Pair(), [slice(0, TOKENS)])
    expected = 0.7 * shares["divergence"] + 0.3 * shares["cross_entropy"]
    close(loss, expected + 0.1 * shares["hidden_state"])


def test_shares_are_means_over_tokens():
    pair = Pair()
    _, shares, _ = take(objective(), pair, [slice(0, TOKENS)])
    logits = pair.hidden @ pair.weight.t()
    close(shares["cross_entropy"], torch.nn.functional.cross_entropy(logits, pair.targets).detach())
    logp, teacher = (
        (x / 2).log_softmax(-1) for x in (logits, pair.teacher_hidden @ pair.teacher_weight.t())
    )
    kl = (teacher.exp() * (teacher - logp)).sum(-1).mean()
    close(shares["divergence"], 4 * kl.detach())


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step():
    loss, _, gradients = take(objective(), Pair(), [slice(0, TOKENS)])
    half, _, half_gradients = take(objective(), Pair(), [slice(0, TOKENS)], 2 * TOKENS)
    close(half, loss / 2)
    for a, b in zip(half_gradients, gradients, strict=True):
        close(a, b / 2)


@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_nothing_scored_gives_zero_with_a_graph(transform, alpha):
    loss, shares, gradients = take(objective(alpha=alpha), Pair(transform), [slice(0, 0)], 0)
    assert loss == 0
    assert all(share == 0 for share in shares.values())
    for gradient in gradients:
        assert gradient is not None
        assert (gradient == 0).all()


@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("divergence", divergences.names())
def test_evaluation_reads_the_same_numbers_without_a_graph(transform, divergence):
    pair, chosen = Pair(transform), objective(divergence)
    loss, shares, _ = take(chosen, pair, [slice(0, TOKENS)])
    with torch.no_grad():
        again, parts = chosen(*pair.cut(slice(0, TOKENS)), torch.tensor(TOKENS))
    assert not again.requires_grad
    close(again, loss)
    for name, share in shares.items():
        close(parts[name], share)


def test_the_teacher_gets_no_gradient():
    pair = Pair()
    pair.teacher_weight.requires_grad_()
    pair.teacher_hidden.requires_grad_()
    pair.teacher_layers.requires_grad_()
    before = pair.teacher_weight.detach().clone()
    take(objective(), pair, [slice(0, TOKENS)])
    assert torch.equal(pair.teacher_weight, before)
    teachers = (pair.teacher_weight, pair.teacher_hidden, pair.teacher_layers)
    assert all(each.grad is None for each in teachers)


def test_inputs_are_not_modified():
    """The closed form works in place, but only in buffers of its own."""
    pair = Pair()
    logits = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    view, signal = pair.cut(slice(0, TOKENS))
    before = [logits.clone(), pair.hidden.detach().clone(), pair.weight.detach().clone()]
    dense = TeacherSignal.from_distribution(DenseLogits(logits), signal.layer_hidden)
    objective()(view, dense, torch.tensor(TOKENS))[0].backward()
    for kept, now in zip(before, [logits, pair.hidden, pair.weight], strict=True):
        assert torch.equal(kept, now)


@pytest.mark.parametrize("transform", [None, soft_cap])
def test_nan_reaches_the_loss(transform):
    pair = Pair(transform)
    with torch.no_grad():
        pair.hidden[3, 0] = torch.nan
    loss, shares, _ = take(objective(), pair, [slice(0, TOKENS)])
    assert torch.isnan(loss)
    assert torch.isnan(shares["divergence"])
    assert torch.isnan(shares["cross_entropy"])


def test_with_state_terms_only_the_head_is_not_multiplied(monkeypatch):
    """And the head still gets its gradient, zero: every rank reduces the same parameters."""
    monkeypatch.setattr("limbeck.losses.head.fused.multiply", None)
    pair, terms = Pair(), objective().state_terms
    alone = Objective([WeightedTerm("hidden_state", 0.1, terms["hidden_state"])])
    loss, shares, gradients = take(alone, pair, [slice(0, TOKENS)])
    close(loss, 0.1 * shares["hidden_state"])
    assert (gradients[1] == 0).all()
    assert gradients[2].abs().max() > 0
