"""Differences between logits, matched without a softmax."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses.distributions.base import TeacherDistribution
from limbeck.losses.distributions.full import whole_logits
from limbeck.losses.signal import SignalNeeds
from limbeck.losses.terms.base import LogitTerm, PairShapes, terms


@terms.register("concrete_score")
class ConcreteScoreTerm(LogitTerm):
    """Sample variance over the vocabulary of student logits less teacher logits, from 0 up.

    Equal to the mean over all token pairs i, j of half the squared difference between the models'
    z_i - z_j, computed in O(V). Invariant to a constant added to either model's logits. In squared
    logits; a temperature would only scale it. Tokens with a logit of minus infinity in either model
    are excluded.

    Source: Kim et al., "Distillation of Large Language Models via Concrete Score Matching", 2025,
    arXiv:2509.25837, with uniform weights.
    """

    needs = SignalNeeds(distribution=True)

    def __init__(self, shapes: PairShapes | None = None) -> None:
        """No options; `shapes` is part of every term's signature."""

    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"],
        teacher: TeacherDistribution | None,
    ) -> Float[Tensor, " N"]:
        """Variance of each token's logit differences."""
        whole = whole_logits(teacher, "concrete_score")
        exact = torch.promote_types(logits.dtype, torch.float32)
        possible = logits.isfinite() & whole.isfinite()
        gap = torch.where(possible, logits, 0).to(exact) - torch.where(possible, whole, 0)
        count = possible.sum(-1)
        mean = gap.sum(-1) / count.clamp_min(1)
        square = torch.where(possible, gap - mean[:, None], 0).square().sum(-1)
        return square / (count - 1).clamp_min(1)
