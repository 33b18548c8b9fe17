"""A student and its teacher on text that was written during the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.config import HeadBudget
from limbeck.distributed import World, all_sum
from limbeck.evaluate.fidelity import MEASURED_ROWS
from limbeck.evaluate.measure import chunks, in_step, token_values
from limbeck.models import CausalLM, evaluating
from limbeck.rollouts import Rollout, rollout_batch
from limbeck.teachers import Teacher

FIGURES = ("forward_kl", "reverse_kl", "teacher_cross_entropy")


def rollout_figures(
    student: CausalLM,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    world: World,
    head_budget_mb: HeadBudget = "auto",
) -> dict[str, float]:
    """Means over the written tokens of all ranks, nats a token; every rank calls it.

    Returns:
        rollout_forward_kl, rollout_reverse_kl, and rollout_teacher_logprob, the teacher's mean
        log-probability of the written tokens.
    """
    sums = rollout_sums(student, teacher, rollouts, world, head_budget_mb).sum(0)
    forward, reverse, cross_entropy, tokens = all_sum(sums).tolist()
    return {
        "rollout_forward_kl": forward / tokens,
        "rollout_reverse_kl": reverse / tokens,
        "rollout_teacher_logprob": -cross_entropy / tokens,
    }


def rollout_sums(
    student: CausalLM,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    world: World,
    head_budget_mb: HeadBudget = "auto",
) -> Float[Tensor, "rollouts figures"]:
    """Sums of `FIGURES`, and the count, over the written tokens of each of this rank's rollouts.

    Every rank calls it.
    """
    names = (*FIGURES, "tokens")
    totals = torch.zeros(len(rollouts), len(names), dtype=world.exact, device=world.device)
    reduce = all_sum if world.size > 1 else None
    with torch.no_grad(), evaluating(student):
        for rows in in_step(range(len(rollouts)), MEASURED_ROWS, world.device, reduce):
            first = rows[0] if rows else 0
            batch = rollout_batch([rollouts[row] for row in rows], first).to(world.device)
            for chunk in chunks(student, teacher, batch, head_budget_mb):
                values = token_values(chunk)
                per_token = torch.stack([values[name] for name in names], dim=1).to(totals)
                totals.index_add_(0, batch.documents()[chunk.window], per_token)
    return totals
