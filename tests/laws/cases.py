"""What the laws are held over: every divergence, every form of teacher distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.distributions import (
    FLOOR,
    DenseLogits,
    LazyLogits,
    TeacherDistribution,
    TopK,
    UnevenTopK,
)
from limbeck.losses.divergences.base import divergences, ranking
from limbeck.losses.terms.divergence import DivergenceTerm

FURTHER = [
    {"type": "jensen_shannon", "beta": 0.1},
    {"type": "skew_forward_kl", "skew": 0.5},
    {"type": "skew_reverse_kl", "skew": 0.5},
    {"type": "adaptive_kl", "head_probability": 0.8},
    {"type": "alpha_beta", "alpha": 0.2, "beta": 0.7},
    {"type": "alpha_beta", "alpha": 1.0, "beta": 0.0},
    {"type": "alpha_beta", "alpha": 0.0, "beta": 0.5},
    {"type": "lk_kl", "scale": 0.5, "decay": 1.0},
]
SPECS = [{"type": name} for name in divergences.names()] + FURTHER
F_DIVERGENCES = [
    spec
    for spec in SPECS
    if spec["type"] not in {"adaptive_kl", "alpha_beta", "lk_kl"}
    or (spec.get("alpha", 0.5) + spec.get("beta", 0.5) == 1 and spec["type"] == "alpha_beta")
]
"""Those that merging outcomes can only shrink, and splitting them evenly leaves alone."""

DIFFERENTIABLE = [spec for spec in SPECS if spec["type"] not in {"adaptive_kl", "todi", "lk_kl"}]
"""Those whose gradient is the derivative of their value; the others hold weights constant."""

KINKED = {"total_variation", "lk", "lk_kl"}
"""Those whose gradient jumps where student and teacher are equal."""

TEMPERATURES = [0.7, 1.0, 2.0, 4.0]


def label(spec: dict) -> str:
    options = ",".join(f"{value:g}" for key, value in spec.items() if key != "type")
    return spec["type"] + (f"({options})" if options else "")


def over(specs: list[dict]):
    """Parametrise a test by `divergence`."""
    bound = [divergences.bind(spec, at="test") for spec in specs]
    return pytest.mark.parametrize("divergence", bound, ids=[label(spec) for spec in specs])


def over_specs(specs: list[dict]):
    """Parametrise a test by `spec`."""
    return pytest.mark.parametrize("spec", specs, ids=[label(spec) for spec in specs])


def lazy(logits: Tensor, temperature: float) -> TeacherDistribution:
    return LazyLogits(logits, Head(torch.eye(logits.shape[-1], dtype=logits.dtype)))


def top_k(logits: Tensor, temperature: float, k: int = 5) -> TeacherDistribution:
    return TopK.from_logits(logits, min(k, logits.shape[-1]), temperature)


def renormalised(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k tokens alone, as many public stores hold them: no probability is left for the tail."""
    top = (logits / temperature).topk(k)
    nothing = torch.full_like(logits[:, 0], FLOOR)
    return TopK(top.indices, top.values.log_softmax(-1), nothing, temperature)


RENORMALISED = ["forward_kl", "jensen_shannon", "skew_forward_kl", "total_variation"]
"""Divergences that stay finite where the teacher gives the tail no probability."""


def uneven(logits: Tensor, temperature: float) -> TeacherDistribution:
    return UnevenTopK.from_logits(logits, min(7, logits.shape[-1]), 0.05, temperature)


FORMS: dict[str, Callable[[Tensor, float], TeacherDistribution]] = {
    "dense": lambda logits, temperature: DenseLogits(logits),
    "lazy": lazy,
    "top_k": top_k,
    "top_1": functools.partial(top_k, k=1),
    "uneven": uneven,
}

MERGING = {"top_k", "top_1", "uneven"}
"""Forms with a tail, which refuse divergences that rank outcomes."""


def over_specs_and_forms(specs: list[dict], names: Iterable[str] | None = None):
    """Parametrise a test by `spec` and `form`, in all pairs that are defined."""
    pairs = [
        pytest.param(spec, form, id=f"{label(spec)}-{name}")
        for spec in specs
        for name, form in FORMS.items()
        if names is None or name in names
        if name not in MERGING or spec["type"] not in ranking.names()
    ]
    return pytest.mark.parametrize(("spec", "form"), pairs)


UNRANKED = [spec for spec in SPECS if spec["type"] not in ranking.names()]
over_temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)
over_paths = pytest.mark.parametrize("path", ["closed form", "general"])


def objective_of(
    logits: Tensor,
    distribution: TeacherDistribution,
    spec: dict,
    temperature: float = 1.0,
    path: str = "closed form",
) -> tuple[Tensor, Tensor]:
    """Mean over rows of T^2 D as training computes it, and its gradient with respect to logits.

    The head is the identity matrix, so hidden states are logits. A head that does anything after
    the product, if only a copy, takes the general path.
    """
    hidden = logits.detach().clone().requires_grad_()
    weight = torch.eye(logits.shape[-1], dtype=logits.dtype)
    head = Head(weight) if path == "closed form" else Head(weight, None, torch.clone)
    term = DivergenceTerm(divergence=spec, temperature=temperature)
    objective = Objective([WeightedTerm("divergence", 1.0, term)])
    targets = torch.zeros(len(logits), dtype=torch.long)
    view = StudentView(hidden, head, {}, targets)
    loss, _ = objective(
        view, TeacherSignal.from_distribution(distribution), torch.tensor(len(logits))
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


def random_logits(rows: int, size: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, size, dtype=torch.float64)


def random_logp(rows: int, size: int) -> Tensor:
    return random_logits(rows, size).log_softmax(-1)
