"""Laws of approximate likelihood matching."""

import math

import pytest
import torch

from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.head.likelihood import token_logprobs
from limbeck.losses.signal import ChunkLikelihoods
from limbeck.losses.terms.alm import AlmTerm, binary_kl, chunk_sums
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm

close = torch.testing.assert_close
TAUS = [None, 1.0, 4.0, 100.0]
over_taus = pytest.mark.parametrize("tau", TAUS)
TOKENS, VOCABULARY, WIDTH = 150, 40, 6


def log_likelihoods(count):
    return -(6 * torch.rand(count, dtype=torch.float64)).exp() / 40


def plain_binary_kl(a, b, tau):
    """The formula, with the digits that cancellation leaves."""
    p, q = (a / tau).exp(), (b / tau).exp()
    return tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


class Case:
    """A student's hidden states and head, chunks of one to three tokens, and a teacher."""

    def __init__(self, transform=None):
        double = torch.float64
        self.hidden = torch.randn(TOKENS, WIDTH, dtype=double, requires_grad=True)
        self.weight = torch.randn(VOCABULARY, WIDTH, dtype=double, requires_grad=True)
        self.head = Head(self.weight, None, transform)
        self.targets = torch.randint(VOCABULARY, (TOKENS,))
        starts = torch.rand(TOKENS) < 0.6
        self.chunk_of = starts.cumsum(0)
        self.num_chunks = int(self.chunk_of.max())
        # The first tokens and a few others are in no chunk.
        self.chunk_of = torch.where(self.chunk_of == 0, self.num_chunks + 1, self.chunk_of) - 1
        self.chunk_of[torch.rand(TOKENS) < 0.05] = self.num_chunks
        self.teacher = log_likelihoods(self.num_chunks)
        self.view = StudentView(self.hidden, self.head, {}, self.targets)
        self.signal = TeacherSignal(likelihoods=ChunkLikelihoods(self.chunk_of, self.teacher))

    def take(self, tau, view=None, extra=()):
        objective = Objective([WeightedTerm("alm", 0.7, AlmTerm(tau=tau)), *extra], 1)
        loss, shares = objective(view or self.view, self.signal, torch.tensor(TOKENS))
        return loss, shares, torch.autograd.grad(loss, [self.hidden, self.weight])


@pytest.mark.parametrize("tau", [1.0, 4.0, 100.0])
def test_value_and_gradient_are_those_of_two_bernoullis(tau):
    a, b = log_likelihoods(500), log_likelihoods(500).requires_grad_()
    wanted = plain_binary_kl(a, b, tau)
    found = binary_kl(a, b, tau)
    close(found, wanted, rtol=1e-7, atol=1e-9)
    gradients = [torch.autograd.grad(each.sum(), b)[0] for each in (found, wanted)]
    close(*gradients, rtol=1e-7, atol=1e-9)


def test_a_large_tau_approaches_the_limit():
    a, b = log_likelihoods(50), log_likelihoods(50).requires_grad_()
    far, limit = binary_kl(a, b, 1e6), binary_kl(a, b, math.inf)
    close(far, limit, rtol=1e-4, atol=1e-4)
    close(
        torch.autograd.grad(far.sum(), b)[0],
        torch.autograd.grad(limit.sum(), b)[0],
        rtol=1e-4,
        atol=1e-4,
    )
    close(limit, a - b + a * (b / a).log())


@over_taus
def test_it_is_zero_with_no_gradient_at_equality_and_positive_elsewhere(tau):
    tau = math.inf if tau is None else tau
    a, b = log_likelihoods(200), log_likelihoods(200)
    same = a.clone().requires_grad_()
    value = binary_kl(a, same, tau)
    assert value.abs().max() < 1e-12
    assert (torch.autograd.grad(value.sum(), same)[0] == 0).all()
    assert (binary_kl(a, b, tau) > 0).all()


@over_taus
def test_extreme_likelihoods_are_finite_in_float32(tau):
    ends = torch.tensor([-1e-9, -0.0, -1e-3, -200.0, -1e4])
    a, b = ends.repeat_interleave(len(ends)), ends.repeat(len(ends)).requires_grad_()
    value = binary_kl(a, b, math.inf if tau is None else tau)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), b)[0].isfinite().all()


def test_with_a_chunk_for_each_token_it_is_the_binary_kl_of_the_realised_token():
    """From whole distributions: this token against any other."""
    case = Case()
    logp = (case.hidden @ case.weight.t()).log_softmax(-1)
    teacher = (3 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)).log_softmax(-1)

    def binary(logp):
        hit = logp.gather(-1, case.targets[:, None])
        rest = logp.scatter(-1, case.targets[:, None], -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([hit, rest], -1)

    p, q = binary(teacher), binary(logp)
    wanted = (p.exp() * (p - q)).sum(-1)
    likelihoods = ChunkLikelihoods(torch.arange(TOKENS), p[:, 0])
    found = AlmTerm(tau=1.0)(case.view, TeacherSignal(likelihoods=likelihoods))
    close(found, wanted, rtol=1e-8, atol=1e-12)


@over_taus
@pytest.mark.parametrize("transform", [None, lambda x: 5 * torch.tanh(x / 5)], ids=["", "cap"])
def test_the_gradient_is_that_of_whole_logits(tau, transform):
    case = Case(transform)
    loss, _, gradients = case.take(tau)
    logits = case.head(case.hidden)
    logp = logits.log_softmax(-1).gather(-1, case.targets[:, None])[:, 0]
    sums = torch.stack([logp[case.chunk_of == c].sum() for c in range(case.num_chunks)])
    covered = torch.tensor([bool((case.chunk_of == c).any()) for c in range(case.num_chunks)])
    if tau is None:
        each = case.teacher - sums + case.teacher * (sums / case.teacher).log()
    else:
        each = plain_binary_kl(case.teacher, sums, tau)
    wanted = 0.7 * each[covered].sum() / TOKENS
    close(loss, wanted, rtol=1e-7, atol=1e-10)
    for a, b in zip(
        gradients, torch.autograd.grad(wanted, [case.hidden, case.weight]), strict=True
    ):
        close(a, b, rtol=1e-6, atol=1e-9)


@over_taus
def test_the_gradient_is_cross_entropys_with_signed_weights(tau):
    case = Case()
    _, _, gradients = case.take(tau)
    logq = token_logprobs(case.hidden.detach(), case.head.detach(), case.targets)
    own = chunk_sums(logq, case.chunk_of, case.num_chunks).requires_grad_()
    value = binary_kl(case.teacher, own, math.inf if tau is None else tau)
    weights = -torch.autograd.grad(value.sum(), own)[0]
    assert (weights > 0).any()
    assert (weights < 0).any()
    weights = torch.cat([weights, weights.new_zeros(1)])[case.chunk_of]
    view = StudentView(case.hidden, case.head, {}, case.targets, token_weights=weights)
    objective = Objective([WeightedTerm("cross_entropy", 0.7, CrossEntropyTerm())], 1)
    loss, _ = objective(view, TeacherSignal(), torch.tensor(TOKENS))
    for a, b in zip(gradients, torch.autograd.grad(loss, [case.hidden, case.weight]), strict=True):
        close(a, b, rtol=1e-10, atol=1e-14)


def test_token_weights_and_other_terms_are_applied_as_to_any_term():
    case = Case()
    plain, _, _ = case.take(None)
    twice = StudentView(
        case.hidden, case.head, {}, case.targets, token_weights=torch.full((TOKENS,), 2.0)
    )
    loss, _, _ = case.take(None, twice)
    close(loss, 2 * plain)
    both, shares, _ = case.take(None, extra=[WeightedTerm("ce", 0.3, CrossEntropyTerm())])
    close(both, plain + 0.3 * shares["ce"])


def test_likelihoods_do_not_depend_on_the_chunks_of_the_head():
    hidden, weight = torch.randn(700, WIDTH).double(), torch.randn(5000, WIDTH).double()
    hidden.requires_grad_()
    targets = torch.randint(5000, (700,))
    found = token_logprobs(hidden, Head(weight), targets, 1)
    wanted = -torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    close(found, wanted)
    close(*(torch.autograd.grad(each.square().sum(), hidden)[0] for each in (found, wanted)))
    assert len(token_logprobs(hidden[:0], Head(weight), targets[:0])) == 0
