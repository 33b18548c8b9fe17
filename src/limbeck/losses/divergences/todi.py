"""Token-wise distillation: a mix of forward and reverse KL per outcome.

Source: Jung et al., "ToDi: Token-wise Distillation via Fine-Grained Divergence Control", 2025,
arXiv:2505.16297.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.divergences.base import divergences


@divergences.register("todi")
def todi(student: Float[Tensor, "N K"], teacher: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """The sum of s p log(p / q) + (1 - s) q log(q / p), s = p / (p + q), nats, from 0 up.

    s is a constant to the gradient, which is what makes it differ from KL both ways: their sum has
    the same value.
    """
    gap = teacher - student
    weight = gap.detach().sigmoid()
    return (gap * (weight * teacher.exp() - (1 - weight) * student.exp())).sum(-1)
