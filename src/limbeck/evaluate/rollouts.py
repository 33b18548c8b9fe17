"""A student and its teacher on text that was written during the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
    totals = torch.zeros(len(FIGURES) + 1, dtype=world.exact, device=world.device)
    reduce = all_sum if world.size > 1 else None
    with torch.no_grad(), evaluating(student):
        for rows in in_step(range(len(rollouts)), MEASURED_ROWS, world.device, reduce):
            batch = rollout_batch([rollouts[row] for row in rows]).to(world.device)
            for chunk in chunks(student, teacher, batch, head_budget_mb):
                values = token_values(chunk)
                sums = [values[name].sum().to(totals) for name in (*FIGURES, "tokens")]
                totals += torch.stack(sums)
    forward, reverse, cross_entropy, tokens = all_sum(totals).tolist()
    return {
        "rollout_forward_kl": forward / tokens,
        "rollout_reverse_kl": reverse / tokens,
        "rollout_teacher_logprob": -cross_entropy / tokens,
    }
