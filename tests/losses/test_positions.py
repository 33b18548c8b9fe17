"""Learning from some positions only, and from some more than from others."""

from dataclasses import replace

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import (
    Head,
    Objective,
    PairShapes,
    SignalNeeds,
    StudentView,
    TeacherSignal,
    WeightedTerm,
    build_objective,
    objective_problems,
)
from limbeck.losses.distributions import DenseLogits, LazyLogits, Samples, TopK
from limbeck.losses.positions import StudentEntropy, TeacherEntropy, top_share
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm
from limbeck.losses.terms.hidden_state import HiddenStateTerm

close = torch.testing.assert_close
TOKENS, VOCABULARY, WIDTH = 30, 17, 6
SHAPES = PairShapes(1, 1, WIDTH, WIDTH, LayerMap(((0, 0),)))


class Counted:
    """What a head does after its product: nothing, but it counts rows."""

    def __init__(self):
        self.rows = 0

    def __call__(self, product):
        self.rows += len(product) if product.ndim == 2 else 0  # not a probe of one number
        return product.clone()


class Step:
    """A student's and an online teacher's answers to one batch."""

    def __init__(self, transform=None, teacher_transform=None):
        torch.manual_seed(1)
        double = torch.float64
        self.hidden = torch.randn(TOKENS, WIDTH, dtype=double, requires_grad=True)
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=double, requires_grad=True)
        self.layer = torch.randn(TOKENS, WIDTH, dtype=double, requires_grad=True)
        teacher = torch.randn(TOKENS, WIDTH, dtype=double)
        teacher *= torch.linspace(0.1, 3, TOKENS)[torch.randperm(TOKENS), None]
        teacher_weight = torch.randn(VOCABULARY, WIDTH, dtype=double)
        targets = torch.randint(VOCABULARY, (TOKENS,))
        head = Head(self.weight, None, transform)
        self.view = StudentView(self.hidden, head, {0: self.layer}, targets)
        lazy = LazyLogits(teacher, Head(teacher_weight, None, teacher_transform))
        self.signal = TeacherSignal.from_distribution(lazy, {0: teacher})

    def gradients(self, objective, view=None):
        loss, shares = objective(view or self.view, self.signal, torch.tensor(TOKENS))
        leaves = [self.hidden, self.weight, self.layer]
        return loss.detach(), shares, torch.autograd.grad(loss, leaves, materialize_grads=True)


def objective(positions=None, divergence="forward_kl"):
    terms = [
        WeightedTerm("divergence", 0.7, DivergenceTerm(divergence=divergence, temperature=2.0)),
        WeightedTerm("cross_entropy", 0.3, CrossEntropyTerm()),
        WeightedTerm("hidden_state", 0.1, HiddenStateTerm(SHAPES)),
    ]
    return Objective(terms, positions=positions).double()


def entropies(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("choice", [TeacherEntropy, StudentEntropy])
@pytest.mark.parametrize("transform", [None, torch.clone])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_only_the_least_certain_positions_are_trained_on(choice, transform, share):
    step = Step(transform)
    logits = step.hidden @ step.weight.t()
    if choice is TeacherEntropy:
        logits = step.signal.distribution.logits()
    count = round(share * TOKENS)
    expected = entropies(logits.detach()).topk(count).indices.sort().values
    assert torch.equal(choice(share=share).choose(step.view, step.signal, 1), expected)
    loss, shares, gradients = step.gradients(objective(choice(share=share)))
    left_out = torch.ones(TOKENS, dtype=torch.bool)
    left_out[expected] = False
    assert (gradients[0][left_out] == 0).all()
    assert (gradients[0][expected].norm(dim=-1) > 0).all()
    assert (gradients[2].norm(dim=-1) > 0).all()  # hidden states are matched everywhere
    few = StudentView(
        step.hidden[expected],
        step.view.head,
        {0: step.layer[expected]},
        step.view.targets[expected],
    )
    said = TeacherSignal.from_distribution(
        step.signal.distribution.rows(expected), {0: step.signal.layer_hidden[0][expected]}
    )
    _, alone = objective()(few, said, torch.tensor(count))
    for name in ("divergence", "cross_entropy"):
        close(shares[name], alone[name])  # means over the chosen
    whole = 0.7 * shares["divergence"] + 0.3 * shares["cross_entropy"]
    close(loss, whole + 0.1 * shares["hidden_state"])


@pytest.mark.parametrize("choice", [TeacherEntropy, StudentEntropy])
def test_all_positions_are_the_plain_objective(choice):
    results = [Step().gradients(objective(chosen)) for chosen in (None, choice(share=1.0))]
    close(results[1][0], results[0][0])
    for a, b in zip(results[1][2], results[0][2], strict=True):
        close(a, b)


def test_head_products_of_positions_left_out_are_skipped():
    few = TOKENS // 10
    student, teacher = Counted(), Counted()
    Step(student, teacher).gradients(objective(TeacherEntropy(share=0.1)))
    assert student.rows == few
    assert teacher.rows == TOKENS + few  # an online teacher's entropy needs its head
    student, teacher = Counted(), Counted()
    Step(student, teacher).gradients(objective(StudentEntropy(share=0.1)))
    assert student.rows == TOKENS + few
    assert teacher.rows == few


@pytest.mark.parametrize("kind", ["top_k", "samples"])
def test_a_recorded_distribution_gives_its_entropy_without_a_head(kind):
    student, step = Counted(), Step()
    logits = step.signal.distribution.logits()
    recorded = TopK.from_logits(logits, VOCABULARY, 2.0)
    if kind == "samples":
        recorded = Samples.from_logits(logits, 5, 2.0)
    close(recorded.entropy(), entropies(logits / 2))
    step.signal = TeacherSignal.from_distribution(recorded, step.signal.layer_hidden)
    step.view = replace(step.view, head=Head(step.weight, None, student))
    step.gradients(objective(TeacherEntropy(share=0.1)))
    assert student.rows == TOKENS // 10


def test_merging_outcomes_can_only_lower_an_entropy():
    logits = 3 * torch.randn(50, 20, dtype=torch.float64)
    whole = DenseLogits(logits).entropy()
    close(whole, entropies(logits))
    assert (TopK.from_logits(logits, 5).entropy() <= whole + 1e-12).all()


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [(0.07, 100, 7), (0.5, 3, 2), (0.01, 30, 1), (1.0, 4, 4), (0.3, 0, 0)],
)
def test_a_share_is_rounded_up(share, size, count):
    chosen = top_share(torch.randn(size), share)
    assert len(chosen) == count
    assert torch.equal(chosen, chosen.sort().values)


@pytest.mark.parametrize("choice", [None, TeacherEntropy(), StudentEntropy()])
def test_nothing_scored_still_has_a_graph(choice):
    step = Step()
    nothing = slice(0, 0)
    view = StudentView(
        step.hidden[nothing], step.view.head, {0: step.layer[nothing]}, step.view.targets[nothing]
    )
    said = TeacherSignal.from_distribution(
        step.signal.distribution.rows(nothing), {0: step.signal.layer_hidden[0][nothing]}
    )
    loss, shares = objective(choice)(view, said, torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert all(share == 0 for share in shares.values())
    assert (step.weight.grad == 0).all()


@pytest.mark.parametrize("transform", [None, torch.clone])
@pytest.mark.parametrize("divergence", ["forward_kl", "todi"])
@pytest.mark.parametrize("kind", ["lazy", "top_k"])
def test_token_weights_multiply_each_positions_terms(transform, divergence, kind):
    step, weights = Step(transform), torch.rand(TOKENS)
    weights[::4] = 0
    if kind == "top_k":
        kept = TopK.from_logits(step.signal.distribution.logits(), 4, 2.0)
        step.signal = TeacherSignal.from_distribution(kept, step.signal.layer_hidden)
    chosen = objective(divergence=divergence)
    weighted = replace(step.view, token_weights=weights)
    loss, shares, gradients = step.gradients(chosen, weighted)
    expected, sums = 0.0, dict.fromkeys(shares, 0.0)
    for row in range(TOKENS):
        one = slice(row, row + 1)
        view = StudentView(
            step.hidden[one], step.view.head, {0: step.layer[one]}, step.view.targets[one]
        )
        said = TeacherSignal.from_distribution(
            step.signal.distribution.rows(one), {0: step.signal.layer_hidden[0][one]}
        )
        part, parts = chosen(view, said, torch.tensor(TOKENS))
        expected = expected + weights[row].double() * part
        for name, share in parts.items():
            sums[name] = sums[name] + weights[row].double() * share
    slopes = torch.autograd.grad(expected, [step.hidden, step.weight, step.layer])
    close(loss, expected.detach())
    for name, share in shares.items():
        close(share, sums[name])
    for a, b in zip(gradients, slopes, strict=True):
        close(a, b)
    assert (gradients[0][::4] == 0).all()


@pytest.mark.parametrize("transform", [None, torch.clone])
def test_token_weights_of_one_change_nothing_also_with_chosen_positions(transform):
    plain = Step(transform).gradients(objective(TeacherEntropy(share=0.3)))
    step = Step(transform)
    ones = replace(step.view, token_weights=torch.ones(TOKENS, dtype=torch.float64))
    weighted = step.gradients(objective(TeacherEntropy(share=0.3)), ones)
    for a, b in zip(weighted[2], plain[2], strict=True):
        close(a, b)


def test_a_recipe_chooses_positions_and_its_errors_are_listed():
    choice = {"type": "teacher_entropy", "share": 0.5}
    built = build_objective(ObjectiveConfig(alpha=0.0, positions=choice), SHAPES, head_budget_mb=1)
    assert isinstance(built.positions, TeacherEntropy)
    assert built.positions.share == 0.5
    assert built.needs == SignalNeeds(distribution=True)
    wrong = {**choice, "share": 0.0}
    for bad, found in (
        (wrong, r"objective.positions.share"),
        ("entropy", "objective.positions.type"),
    ):
        (problem,) = objective_problems(ObjectiveConfig(positions=bad))
        assert problem.at == found
