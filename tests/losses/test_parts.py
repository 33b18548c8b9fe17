"""A signal in parts: several distributions, each at some of the positions."""

import itertools

import pytest
import torch

from limbeck.errors import DataError
from limbeck.losses import (
    Head,
    Objective,
    SignalPart,
    StudentView,
    TeacherSignal,
    WeightedTerm,
)
from limbeck.losses.distributions import DenseLogits, LazyLogits, TopK
from limbeck.losses.positions import StudentEntropy, TeacherEntropy
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm

close = torch.testing.assert_close
TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = 150, 40, 6, 5
over_paths = pytest.mark.parametrize("transform", [None, torch.clone], ids=["closed", "autograd"])
over_divergences = pytest.mark.parametrize("divergence", ["forward_kl", "todi"])


class Case:
    """A student's hidden states and head, and a teacher's."""

    def __init__(self, transform=None):
        double = torch.float64
        self.hidden = torch.randn(TOKENS, WIDTH, dtype=double, requires_grad=True)
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=double, requires_grad=True)
        head = Head(self.weight) if transform is None else Head(self.weight, None, transform)
        self.targets = torch.randint(VOCABULARY, (TOKENS,))
        self.token_weights = torch.rand(TOKENS, dtype=double)
        self.view = StudentView(
            self.hidden, head, {}, self.targets, token_weights=self.token_weights
        )
        teacher_head = Head(torch.randn(VOCABULARY, TEACHER_WIDTH, dtype=double))
        self.lazy = LazyLogits(torch.randn(TOKENS, TEACHER_WIDTH, dtype=double), teacher_head)
        self.order = torch.randperm(TOKENS)

    def take(self, objective, signal, view=None):
        loss, shares = objective(view or self.view, signal, torch.tensor(TOKENS))
        return loss, shares, torch.autograd.grad(loss, [self.hidden, self.weight])


def objective(divergence="forward_kl", positions=None, alpha=0.7) -> Objective:
    terms = [
        WeightedTerm("divergence", alpha, DivergenceTerm(divergence=divergence, temperature=2.0))
    ]
    if alpha < 1:
        terms.append(WeightedTerm("cross_entropy", 1 - alpha, CrossEntropyTerm()))
    return Objective(terms, 1, positions)


def parted(case, form=lambda lazy: lazy, cuts=(0, 30, 31, 31, TOKENS)):
    """The same distribution, cut into parts over a permutation of the positions."""
    windows = [case.order[a:b] for a, b in itertools.pairwise(cuts)]
    parts = tuple(SignalPart(each, form(case.lazy.rows(each))) for each in windows)
    return TeacherSignal(parts)


def same(got, expected):
    close(got[0], expected[0])
    close(got[1], expected[1])
    for a, b in zip(got[2], expected[2], strict=True):
        close(a, b)


@over_paths
@over_divergences
@pytest.mark.parametrize(
    "form",
    [
        lambda d: d,
        lambda d: DenseLogits(d.logits()),
        lambda d: TopK.from_logits(d.logits(), 8, 2.0),
    ],
    ids=["lazy", "dense", "top_k"],
)
def test_cutting_a_signal_into_parts_changes_neither_loss_nor_gradients(
    transform, divergence, form
):
    case = Case(transform)
    whole = case.take(objective(divergence), TeacherSignal.from_distribution(form(case.lazy)))
    same(case.take(objective(divergence), parted(case, form)), whole)


@over_paths
@over_divergences
def test_parts_may_be_held_in_different_forms(transform, divergence):
    case = Case(transform)
    every = TopK.from_logits(case.lazy.logits(), VOCABULARY - 1, 2.0)  # all but one: still exact
    first, second = case.order[:60], case.order[60:]
    mixed = TeacherSignal(
        (SignalPart(first, case.lazy.rows(first)), SignalPart(second, every.rows(second)))
    )
    whole = TeacherSignal.from_distribution(case.lazy)
    same(case.take(objective(divergence), mixed), case.take(objective(divergence), whole))


@over_paths
@over_divergences
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_positions_in_no_part_have_the_loss_of_their_text_alone(transform, divergence, alpha):
    case = Case(transform)
    covered = case.order[:55]
    partial = TeacherSignal((SignalPart(covered, case.lazy.rows(covered)),))
    loss, shares, gradients = case.take(objective(divergence, alpha=alpha), partial)
    logits = case.hidden @ case.weight.t()
    pair = case.lazy.compare(logits, 2.0)
    term = DivergenceTerm(divergence=divergence, temperature=2.0)
    mask = torch.zeros(TOKENS, dtype=torch.float64)
    mask[covered] = 1
    soft = 4 * term.divergence(pair.student, pair.teacher) * mask
    hard = torch.nn.functional.cross_entropy(logits, case.targets, reduction="none")
    expected = (alpha * soft + (1 - alpha) * hard) @ case.token_weights / TOKENS
    close(loss, expected)
    close(shares["divergence"], (soft @ case.token_weights / TOKENS).detach())
    for a, b in zip(
        gradients, torch.autograd.grad(expected, [case.hidden, case.weight]), strict=True
    ):
        close(a, b)


@over_paths
@pytest.mark.parametrize("parts", [(), "empty"])
def test_without_any_covered_position_the_text_is_all(transform, parts):
    case = Case(transform)
    nothing = torch.empty(0, dtype=torch.long)
    if parts == "empty":
        parts = (SignalPart(nothing, case.lazy.rows(nothing)),)
    loss, shares, gradients = case.take(objective(), TeacherSignal(parts))
    hard = Objective([WeightedTerm("cross_entropy", 0.3, CrossEntropyTerm())], 1)
    expected = case.take(hard, TeacherSignal())
    close(loss, expected[0])
    assert shares["divergence"] == 0
    for a, b in zip(gradients, expected[2], strict=True):
        close(a, b)


@pytest.mark.parametrize("choice", [TeacherEntropy, StudentEntropy])
def test_a_choice_of_positions_is_the_same_for_a_signal_in_parts(choice):
    case = Case()
    chosen = objective(positions=choice(share=0.3))
    whole = case.take(chosen, TeacherSignal.from_distribution(case.lazy))
    same(case.take(chosen, parted(case)), whole)


def test_positions_without_a_distribution_are_chosen_last():
    case = Case()
    covered = case.order[:15].sort().values
    partial = TeacherSignal((SignalPart(covered, case.lazy.rows(covered)),))
    got = TeacherEntropy(share=0.1).choose(case.view, partial, 1)
    assert torch.equal(got, covered)


def test_a_teachers_head_is_not_multiplied_where_it_has_no_part(monkeypatch):
    case = Case()
    seen = []
    take = LazyLogits.rows

    def watch(self, window):
        rows = take(self, window)
        seen.append(len(rows.hidden))
        return rows

    covered = case.order[:20]
    partial = TeacherSignal((SignalPart(covered, case.lazy.rows(covered)),))
    monkeypatch.setattr(LazyLogits, "rows", watch)
    case.take(objective(), partial)
    assert sum(seen) == 20


def test_one_distribution_of_all_positions_is_read_back_and_several_are_refused():
    case = Case()
    assert TeacherSignal().distribution is None
    assert TeacherSignal.from_distribution(None).parts == ()
    assert TeacherSignal.from_distribution(case.lazy).distribution is case.lazy
    with pytest.raises(DataError, match=r"one distribution for all scored positions.* 4 parts"):
        assert parted(case).distribution
    with pytest.raises(AssertionError, match="only one"):
        TeacherSignal((SignalPart(None, case.lazy), SignalPart(case.order[:0], case.lazy)))
    twice = TeacherSignal((SignalPart(case.order, case.lazy),) * 2)
    with pytest.raises(AssertionError, match="overlap"):
        case.take(objective(), twice)
