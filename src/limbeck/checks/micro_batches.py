"""Check that cutting a step into micro-batches does not change it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.checks.case import Case
from limbeck.checks.proof import Finding, Proof, Unproven, distance
from limbeck.distributed import cast_weights, whole
from limbeck.models import CausalLM, evaluating
from limbeck.models.adapters import UP
from limbeck.teachers import TeacherRequest

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest relative difference: rows are summed in another order, through every layer."""


def micro_batches_add_up(case: Case, batch: Batch, dtype: torch.dtype) -> Finding:
    """Loss and gradient of a batch equal the sums over its rows, run one by one.

    The gradient is with respect to norms and biases, which are small and in every layer.

    Args:
        batch: A few rows, scored unevenly, so that a mean of means would show.
    """
    name = "micro-batches add up"
    rows = len(batch.scored)
    if rows < 2:
        return Unproven(name, "the text has only one row")
    if case.distiller.objective.positions is not None:
        return Unproven(
            name, "objective.positions chooses within each micro-batch, so cutting changes a step"
        )
    step_tokens = batch.num_scored()
    parameters = small_parameters(case.student)
    with evaluating(case.distiller):
        whole_loss, whole_gradient = share(case, batch, step_tokens, parameters)
        parts = [
            share(case, batch.part(slice(i, i + 1)), step_tokens, parameters) for i in range(rows)
        ]
    loss = torch.stack([each for each, _ in parts]).sum()
    gradient = torch.stack([each for _, each in parts]).sum(0)
    allowed = ALLOWED[dtype]
    errors = distance(loss, whole_loss), distance(gradient, whole_gradient)
    return Proof(
        name,
        all(error <= allowed for error in errors),
        f"loss {errors[0]:.1e}, gradient {errors[1]:.1e}, relative (allowed {allowed:.0e}), "
        f"{rows} rows with {', '.join(map(str, batch.scored.sum(1).tolist()))} scored tokens",
        "memory.micro_batch and the number of ranks change memory and speed, not results",
    )


def share(
    case: Case, batch: Batch, step_tokens: Tensor, parameters: list[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of the loss, and of the gradient of some parameters, in one row."""
    case.teacher.require(TeacherRequest(needs=case.distiller.objective.needs))
    with cast_weights(case.distiller):
        loss, _ = case.distiller(batch, case.teacher.signal(batch), step_tokens)
        loss.backward()
    gradients = [whole(p.grad).flatten() for p in parameters if p.grad is not None]
    case.distiller.zero_grad(set_to_none=True)
    return loss.detach(), torch.cat(gradients)


def small_parameters(model: CausalLM) -> list[nn.Parameter]:
    """Vectors among a model's trained parameters, its smallest matrix, or all B of its adapters."""
    if model.adapters:  # gradients of A are 0 while B is
        return [p for n, p in model.named_parameters() if n.endswith(UP)]
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if p.ndim == 1] or [min(trained, key=Tensor.numel)]
