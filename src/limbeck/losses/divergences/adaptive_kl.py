"""Forward and reverse KL, weighted by where student and teacher differ.

Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
Language Models", 2024, arXiv:2404.02657, section 4.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.divergences.base import divergences, ranking
from limbeck.losses.divergences.kl import forward_kl, reverse_kl


@divergences.register("adaptive_kl")
@ranking.register("adaptive_kl")
def adaptive_kl(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    *,
    head_probability: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
) -> Float[Tensor, " N"]:
    """Weight w times KL(teacher || student), and 1 - w times KL(student || teacher), nats.

    w is the share of the total gap |p - q| that lies on the teacher's head: its most probable
    outcomes with at most `head_probability` together, the first always among them. w is constant to
    the gradient. The head and the default are those of the public code; but outcomes as probable
    as the last of the head belong to it, so that the order of the vocabulary does not matter.

    Args:
        head_probability: Teacher's probability of the head.
    """
    weight = head_share(student.detach(), teacher.detach(), head_probability)
    return weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)


def head_share(
    student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"], head_probability: float
) -> Float[Tensor, " N"]:
    """Share of |p - q| on the teacher's head; 0 where the two are equal."""
    p = teacher.exp()
    gap = (p - student.exp()).abs()
    ordered = p.sort(dim=-1, descending=True).values
    is_head = ordered.cumsum(-1) <= head_probability
    is_head[:, 0] = True
    min_prob = ordered.masked_fill(~is_head, torch.inf).amin(-1, keepdim=True)
    on_head = gap.masked_fill(p < min_prob, 0).sum(-1)
    return on_head / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
