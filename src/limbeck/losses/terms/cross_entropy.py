"""Hard labels: the data's next token, or text a teacher generated (sequence-level KD)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.losses.distributions.base import TeacherDistribution
from limbeck.losses.terms.base import LogitTerm, PairShapes, terms


@terms.register("cross_entropy")
class CrossEntropyTerm(LogitTerm):
    """Negative log-likelihood of the target token at temperature 1, nats."""

    def __init__(self, shapes: PairShapes | None = None) -> None:
        """No options; `shapes` is part of every term's signature."""

    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"],
        teacher: TeacherDistribution | None,
    ) -> Float[Tensor, " N"]:
        """Loss of each token, in at least float32."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(exact, targets, reduction="none")
