"""Proofs about the objective: zero at equality, true gradients, fused equal to plain logits.

They compute in float64 where possible, so that rounding cannot hide or mimic an error.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.checks.case import Case, Views
from limbeck.checks.proof import Finding, Proof, Unproven, distance
from limbeck.config.schedules import value_at
from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.build import MAIN
from limbeck.losses.distributions import DenseLogits, LazyLogits
from limbeck.losses.divergences import divergences
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm

FLOAT64_BYTES = 1 << 30
"""Largest head that is copied in float64; above, proofs compute in float32."""

ZERO = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest accepted zero: nats of a divergence, or its gradient relative to cross-entropy's."""

DIFFERENCE = {torch.float64: (1e-5, 1e-5), torch.float32: (1e-2, 5e-2)}
"""Step of a finite difference in units of the hidden state's size, and the error allowed relative
to the largest entry. float32 keeps 7 digits of a loss, so a difference over a step keeps two."""

FUSED = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference from plain logits, by the coarsest format among both models' numbers."""

NUM_PROBES = 3
"""Positions, and entries of each, that finite differences probe."""


@dataclass(frozen=True)
class LossAndGradients:
    """A loss and its gradients.

    Attributes:
        loss: Mean over the positions.
        hidden: Gradient with respect to the student's hidden states.
        rows: Gradient with respect to the rows of the head that the targets name.
    """

    loss: Float[Tensor, ""]
    hidden: Float[Tensor, "N D"]
    rows: Float[Tensor, "R D"]


def zero_at_equality(case: Case, views: Views) -> Finding:
    """The teacher compared with itself, by the recipe's divergence, gives 0 and a gradient of 0."""
    name = "student = teacher gives 0"
    term = case.distiller.objective.logit_terms.get("divergence")
    if term is None:
        return Unproven(
            name, "the objective has no divergence, so the run compares no distributions"
        )
    teacher, targets = views.distribution, views.student.targets
    dtype = exact(teacher.head)
    hidden, head = teacher.hidden.to(dtype), teacher.head.to(dtype)
    student = StudentView(hidden, head, {}, targets)
    signal = TeacherSignal.from_distribution(LazyLogits(hidden, head))
    soft = evaluate(Objective([WeightedTerm("divergence", 1.0, term)], 1), student, signal)
    hard = evaluate(Objective([WeightedTerm("hard", 1.0, CrossEntropyTerm())], 1), student, signal)
    value = float(soft.loss)
    share = float(soft.hidden.norm() / hard.hidden.norm())
    return Proof(
        name,
        abs(value) <= ZERO[dtype] and share <= ZERO[dtype],
        f"{value:.1e} nats; gradient {share:.1e} of the cross-entropy's "
        f"(allowed {ZERO[dtype]:.0e}, {named(dtype)}, {len(targets)} positions)",
        "the divergence has its minimum where it should: at the teacher",
    )


def fused_against_plain(case: Case, views: Views) -> Proof:
    """Loss and gradients equal those of whole logits, computed by the recipe's formula."""
    fused = evaluate(case.distiller.objective, views.student, views.signal)
    plain = with_plain_logits(case, views)
    formats = [each.dtype for each in (views.student.hidden, views.distribution.hidden)]
    formats += [views.student.head.weight.dtype, views.distribution.head.weight.dtype]
    allowed = max(FUSED[each] for each in formats)
    errors = (
        distance(fused.loss, plain.loss),
        distance(fused.hidden, plain.hidden),
        distance(fused.rows, plain.rows),
    )
    return Proof(
        "fused equals plain logits",
        all(error <= allowed for error in errors),
        f"loss {errors[0]:.1e}, gradient of hidden states {errors[1]:.1e}, of the head "
        f"{errors[2]:.1e}, relative (allowed {allowed:.0e})",
        "computing logits a chunk at a time changes memory and speed only; alpha, T and T^2 are "
        "where the formula has them",
    )


def finite_differences(case: Case, views: Views) -> Finding:
    """The gradient equals central differences of the loss, at a few entries of a few positions."""
    name = "gradient equals finite differences"
    dtype = exact(views.student.head, views.distribution.head)
    near = views.rows(slice(NUM_PROBES), dtype)
    objective = copy.deepcopy(case.distiller.objective).to(dtype)
    objective.positions = None
    gradient = evaluate(objective, near.student, near.signal).hidden
    step, allowed = DIFFERENCE[dtype]
    step *= float(near.student.hidden.square().mean().sqrt())
    places = gradient.abs().topk(NUM_PROBES, dim=-1).indices
    error = distance(
        gradient.gather(-1, places), central_differences(objective, near, places, step)
    )
    measured = (
        f"{error:.1e} of the largest, central differences at {places.numel()} entries "
        f"(allowed {allowed:.0e}, {named(dtype)})"
    )
    plain = with_plain_logits(case, near)
    if not error <= allowed and distance(gradient, plain.hidden) <= FUSED[dtype]:
        return Unproven(
            name,
            "a term treats one of its factors as constant, so its gradient is not the "
            f"derivative of its value; {measured}",
        )
    return Proof(
        name, error <= allowed, measured, "an optimizer that follows the gradient lowers this loss"
    )


def central_differences(
    objective: Objective, near: Views, places: Int[Tensor, "N k"], step: float
) -> Float[Tensor, "N k"]:
    """Central differences of the loss at some entries of each hidden state."""
    differences = torch.zeros_like(places, dtype=near.student.hidden.dtype)
    for n, entries in enumerate(places.tolist()):
        for k, d in enumerate(entries):
            ends = []
            for moved in (step, -step):
                hidden = near.student.hidden.clone()
                hidden[n, d] += moved
                student = replace(near.student, hidden=hidden)
                with torch.no_grad():
                    ends.append(objective(student, near.signal, count(student))[0])
            differences[n, k] = (ends[0] - ends[1]) / (2 * step)
    return differences


def evaluate(objective: Objective, student: StudentView, signal: TeacherSignal) -> LossAndGradients:
    """An objective's loss and gradients through its fused head, in the smallest chunks.

    All positions are used, also if the recipe selects positions: the formula is the same.
    """
    hidden = student.hidden.detach().requires_grad_()
    weight = student.head.weight.detach().requires_grad_()
    head = student.head._replace(weight=weight)
    budget, chosen = objective.head_budget_mb, objective.positions
    objective.head_budget_mb, objective.positions = 0, None
    try:
        loss, _ = objective(replace(student, hidden=hidden, head=head), signal, count(student))
    finally:
        objective.head_budget_mb, objective.positions = budget, chosen
    by_hidden, by_weight = torch.autograd.grad(loss, [hidden, weight])
    return LossAndGradients(loss.detach(), by_hidden, by_weight[distinct(student.targets)])


def with_plain_logits(case: Case, views: Views) -> LossAndGradients:
    """The same with whole logits and autograd.

    Mean over tokens of weight (alpha T^2 D(teacher_T, student_T) + (1 - alpha) CE + extra terms).
    """
    student, recipe = views.student, case.recipe
    dtype = exact(student.head, views.distribution.head)
    hidden = student.hidden.to(dtype).requires_grad_()
    weight = student.head.weight.detach().to(dtype).requires_grad_()
    head = student.head.to(dtype)._replace(weight=weight)
    products = torch.nn.functional.linear(hidden, head.weight, head.bias)
    logits = products if head.transform is None else head.transform(products)
    teacher = DenseLogits(views.distribution.head(views.distribution.hidden).to(dtype))
    alpha, temperature = value_at(recipe.alpha, 0), value_at(recipe.temperature, 0)
    tokens = (1 - alpha) * torch.nn.functional.cross_entropy(
        logits, student.targets, reduction="none"
    )
    if recipe.divergence is not None and alpha > 0:
        divergence = divergences.bind(recipe.divergence, at="objective.divergence")
        pair = teacher.compare(logits, temperature)
        tokens = tokens + alpha * temperature**2 * divergence(pair.student, pair.teacher)
    objective = case.distiller.objective
    for name, term in objective.logit_terms.items():
        if name not in MAIN:
            tokens = tokens + objective.weights[name] * term(logits, student.targets, teacher)
    for name, state_term in objective.state_terms.items():
        values = state_term(replace(student, hidden=hidden, head=head), views.signal)
        tokens = tokens + objective.weights[name] * values
    weights = 1.0 if student.token_weights is None else student.token_weights.to(tokens)
    loss = (weights * tokens).mean()
    by_hidden, by_weight = torch.autograd.grad(loss, [hidden, weight])
    return LossAndGradients(loss.detach(), by_hidden, by_weight[distinct(student.targets)])


def exact(*heads: Head) -> torch.dtype:
    """float64 where the device has it and the heads are small enough, else float32."""
    is_large = any(head.weight.numel() * 8 > FLOAT64_BYTES for head in heads)
    has_float64 = heads[0].weight.device.type != "mps"
    return torch.float32 if is_large or not has_float64 else torch.float64


def count(student: StudentView) -> Int[Tensor, ""]:
    """Number of positions, as a tensor."""
    return torch.tensor(len(student.targets), device=student.targets.device)


def distinct(ids: Int[Tensor, " N"]) -> Int[Tensor, " R"]:
    """The distinct ids, sorted."""
    return torch.tensor(sorted(set(ids.tolist())), device=ids.device)


def named(dtype: torch.dtype) -> str:
    """A number format's name."""
    return str(dtype).removeprefix("torch.")
