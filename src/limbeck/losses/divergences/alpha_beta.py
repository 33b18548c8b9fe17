"""The alpha-beta family, which holds both KLs, Hellinger and squared distance.

Source: Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
Distillation via alpha-beta-Divergence", 2025, arXiv:2505.04560; Cichocki et al., 2011,
"Generalized Alpha-Beta Divergences", for the limits.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.divergences.base import divergences


@divergences.register("alpha_beta")
def alpha_beta(
    student: Float[Tensor, "N K"],
    teacher: Float[Tensor, "N K"],
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    """Alpha-beta divergence, from 0 up, continued to alpha = 0, beta = 0 and alpha = -beta.

    With p the teacher and q the student, minus the sum of p^alpha q^beta - alpha/(alpha + beta)
    p^(alpha + beta) - beta/(alpha + beta) q^(alpha + beta), over alpha beta. (1, 0) is forward KL,
    (0, 1) reverse KL, (0.5, 0.5) is 4 (1 - the sum of sqrt(p q)), (1, 1) half the squared distance.
    The edges are the limits (Cichocki et al.): over alpha^2 or beta^2. The authors' code divides by
    alpha or beta once there, and so jumps wherever that is not 1.

    Args:
        alpha: Exponent of the teacher. Negative ones are unbounded at impossible outcomes.
        beta: Exponent of the student, likewise.
    """
    gap = teacher - student
    both = alpha + beta
    if alpha == 0 and beta == 0:
        return 0.5 * gap.square().sum(-1)
    if beta == 0:
        p, q = (alpha * teacher).exp(), (alpha * student).exp()
        return (p * alpha * gap - p + q).sum(-1) / alpha**2
    if alpha == 0:
        p, q = (beta * teacher).exp(), (beta * student).exp()
        return (p - q - q * beta * gap).sum(-1) / beta**2
    if both == 0:
        return ((alpha * gap).expm1() - alpha * gap).sum(-1) / alpha**2
    product = (alpha * teacher + beta * student).exp()
    own = alpha / both * (both * teacher).exp() + beta / both * (both * student).exp()
    return (own - product).sum(-1) / (alpha * beta)
