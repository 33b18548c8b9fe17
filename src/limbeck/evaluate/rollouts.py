"""A student and its teacher on text that was written during the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

UNLIKELY = 1.0
"""A student needs a cold start if its texts have so many more nats a token than held-out text."""

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


def cold_start_note(figures: Mapping[str, float], text_cross_entropy: float | None) -> str:
    """How likely the teacher finds what the student writes before its first step.

    Args:
        figures: `rollout_figures`.
        text_cross_entropy: The teacher's on held-out text, nats a token, if it is known.
    """
    own = -figures["rollout_teacher_logprob"]
    text = f"the student's first texts have {own:.2f} nats a token under the teacher"
    if text_cross_entropy is None:
        return f"{text}."
    text += f", held-out text {text_cross_entropy:.2f}"
    if own - text_cross_entropy < UNLIKELY:
        return f"{text}."
    return (
        f"{text}. The teacher's distributions after such text are of little use: train the student "
        "on fixed text first, in a stage before this one."
    )


def rollout_sums(
    student: CausalLM,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    world: World,
    head_budget_mb: HeadBudget = "auto",
) -> Float[Tensor, "rollouts figures"]:
    """Sums of `FIGURES`, and the count, over the written tokens of each of this rank's rollouts.

    Every rank calls it.

    Args:
        teacher: One without whole distributions gives likelihoods too.
    """
    names = (*FIGURES, "tokens")
    totals = torch.zeros(len(rollouts), len(names), dtype=world.exact, device=world.device)
    reduce = all_sum if world.size > 1 else None
    with torch.no_grad(), evaluating(student):
        for rows in in_step(range(len(rollouts)), MEASURED_ROWS, world.device, reduce):
            first = rows[0] if rows else 0
            batch = rollout_batch([rollouts[row] for row in rows], first).to(world.device)
            signal = teacher.signal(batch)
            for chunk in chunks(student, signal, batch, head_budget_mb):
                values = token_values(chunk)
                if signal.likelihoods is not None:
                    own = signal.likelihoods.logprobs.to(totals.device)[chunk.window]
                    values["teacher_cross_entropy"] = -own
                per_token = torch.stack([values[name] for name in names], dim=1).to(totals)
                totals.index_add_(0, batch.documents()[chunk.window], per_token)
    return totals
