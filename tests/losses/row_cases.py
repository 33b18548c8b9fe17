"""One chunk through the row kernel, and the same chunk in float64 by autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.losses import Head, StudentView
from limbeck.losses.distributions import DenseLogits, TeacherDistribution
from limbeck.losses.distributions.base import FLOOR
from limbeck.losses.head.row_kernel import body
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HARD, SOFT = 0.4, 0.6


@dataclass(frozen=True)
class Chunk:
    """Products of a chunk, the teacher's distribution at its rows, and the objective's options."""

    products: Tensor
    teacher: TeacherDistribution | None
    spec: dict
    temperature: float = 1.0
    weights: Tensor | None = None
    transform: object = None
    has_hard: bool = True
    has_soft: bool = True

    @property
    def targets(self) -> Tensor:
        places = torch.arange(len(self.products))
        return (places * 37 + 5) % self.products.shape[1]

    def terms(self) -> tuple[list, list]:
        term = DivergenceTerm(divergence=self.spec, temperature=self.temperature)
        both = [(CrossEntropyTerm(), HARD, self.has_hard), (term, SOFT, self.has_soft)]
        wanted = [(term, weight) for term, weight, is_used in both if is_used]
        return [term for term, _ in wanted], [weight for _, weight in wanted]


def kernel_body(chunk: Chunk, dtype: torch.dtype = torch.float32) -> body.RowKernel | None:
    """The body that training would use for the chunk on the device under test."""
    hidden = torch.zeros(len(chunk.products), 1, dtype=dtype, device=DEVICE)
    weight = torch.zeros(chunk.products.shape[1], 1, dtype=dtype, device=DEVICE)
    weights = None if chunk.weights is None else chunk.weights.to(DEVICE)
    head = Head(weight, None, chunk.transform)
    view = StudentView(hidden, head, {}, chunk.targets.to(DEVICE), weights)
    teacher = None if chunk.teacher is None else chunk.teacher.to(DEVICE)
    return body.row_kernel(*chunk.terms(), view, teacher, Workspace())


def by_kernel(
    chunk: Chunk, dtype: torch.dtype = torch.float32, wants_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Sums of the terms and the gradient, as the kernel computes them."""
    rows = kernel_body(chunk, dtype)
    assert rows is not None
    size = tuple(chunk.products.shape)
    like = torch.empty(0, device=DEVICE)
    products = rows.workspace.take_rows("student", size, like, dtype, padded=True)
    products.copy_(chunk.products)
    sums, gradient = rows(products, slice(0, size[0]), wants_gradient)
    return sums.cpu(), gradient.cpu()


def by_reference(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The same in float64 by autograd, from whole logits."""
    products = chunk.products.double().requires_grad_()
    logits = products if chunk.transform is None else chunk.transform(products)
    terms, factors = chunk.terms()
    weights = torch.ones(len(logits)) if chunk.weights is None else chunk.weights
    sums = []
    for term in terms:
        if chunk.teacher is None and isinstance(term, DivergenceTerm):
            sums.append(logits.sum() * 0)
            continue
        sums.append((term(logits, chunk.targets, chunk.teacher) * weights.double()).sum())
    total = sum(factor * each for factor, each in zip(factors, sums, strict=True))
    (gradient,) = torch.autograd.grad(total, products)
    return torch.stack([each.detach() for each in sums]), gradient


def floored_reference(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Value and gradient by formula where log-probabilities reach the floor.

    Autograd of the exact functions passes gradients below the floor that a closed form clamps.
    """
    assert isinstance(chunk.teacher, DenseLogits)
    assert chunk.weights is None
    assert not chunk.has_hard
    temperature = chunk.temperature
    products = chunk.products.double()
    student = (products / temperature).log_softmax(-1)
    q = student.exp()
    teacher = (chunk.teacher.logits.double() / temperature).log_softmax(-1).clamp_min(FLOOR)
    leaf = student.clamp_min(FLOOR).requires_grad_()
    value = chunk.terms()[0][0].divergence(leaf, teacher)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    gradient = slope - q * slope.sum(-1, keepdim=True)
    return value.detach().sum()[None] * temperature**2, SOFT * temperature * gradient


def require_equal(
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    rounding: float = 0.0,
    size: float = 2e-5,
) -> None:
    """Compare sums, and gradients beside the largest of their row.

    Args:
        got: The kernel's.
        expected: In float64.
        rounding: Relative error of the gradient's dtype.
        size: Largest error of the gradient, relative to the largest of its row.
    """
    sums, gradient = got
    assert torch.isfinite(gradient.float()).all()
    error = (sums.double() - expected[0]).abs() / (1 + expected[0].abs())
    assert error.max() < 3e-6, (sums, expected[0])
    scale = expected[1].abs().amax(-1, keepdim=True).clamp_min(2e-2)
    error = (gradient.double() - expected[1]).abs() - rounding * expected[1].abs()
    worst = (error / scale).max()
    assert worst < size, worst
