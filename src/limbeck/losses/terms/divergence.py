"""Logit distillation: a divergence between the next-token distributions."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.config.schedules import Schedule, Scheduled, value_at
from limbeck.losses.distributions.base import TeacherDistribution, require_served
from limbeck.losses.distributions.samples import DrawnTokens
from limbeck.losses.divergences.base import divergences, gradients
from limbeck.losses.signal import SignalNeeds
from limbeck.losses.terms.base import LogitTerm, PairShapes, SteppedTerm, terms
from limbeck.registry import Component, type_of


@terms.register("divergence")
class DivergenceTerm(LogitTerm, SteppedTerm):
    """Any divergence, at any temperature, from any form of teacher distribution.

    Attributes:
        name: The divergence's.
        divergence: The pure function.
        gradient: Its closed-form derivative, if it has one.
        options: The derivative's options, by name, in the order of its signature.
        temperature: Of both softmaxes, at the current step.
    """

    needs = SignalNeeds(distribution=True)

    def __init__(
        self,
        shapes: PairShapes | None = None,
        *,
        divergence: Annotated[Component | str, divergences] = "forward_kl",
        temperature: Annotated[float | Schedule, Scheduled(Gt(0))] = 1.0,
    ) -> None:
        """
        Args:
            divergence: Its name, or `{type: name, **options}`; see `limbeck.losses.divergences`.
            temperature: Divides both models' logits. The loss is multiplied by its square, which
                keeps the gradient's size (Hinton et al., 2015, arXiv:1503.02531, section 2).
        """
        self.name = type_of(divergence)
        self.divergence = divergences.bind(divergence, at="divergence")
        has_gradient = self.name in gradients.names()
        self.gradient = gradients.bind(divergence, at="divergence") if has_gradient else None
        self.options = gradients.values(divergence) if has_gradient else {}
        self._schedule = temperature
        self.temperature = value_at(temperature, 0)

    def set_step(self, step: int) -> None:
        """Set the temperature of an optimizer step."""
        self.temperature = value_at(self._schedule, step)

    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"],
        teacher: TeacherDistribution | None,
    ) -> Float[Tensor, " N"]:
        """Temperature squared times the divergence of each token."""
        assert teacher is not None, "a term that needs a distribution is not called without one"
        require_served(teacher, self.name)
        pair = teacher.compare(logits, self.temperature)
        value = self.divergence(pair.student, pair.teacher)
        if isinstance(teacher, DrawnTokens):
            value = value + teacher.correction()
        return value * self.temperature**2
