"""Feature distillation: match the teacher's hidden states layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.signal import SignalNeeds, TeacherSignal
from limbeck.losses.terms.base import PairShapes, StateTerm, StudentView, terms
from limbeck.losses.terms.layer_maps import LayerChoice, chosen_map
from limbeck.losses.terms.projectors import Projectors, upcast

Gap = Callable[[Tensor, Tensor], Tensor]
"""Maps projected student states and teacher states to one number a token."""


def squared(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Mean squared difference over the dimensions."""
    return (student - teacher).square().mean(-1)


def relative(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Squared distance divided by the squared norm of the teacher state.

    Norms differ by a factor of hundreds between tokens; here every token has the same weight.
    """
    length = teacher.square().sum(-1).clamp_min(torch.finfo(teacher.dtype).tiny)
    return (student - teacher).square().sum(-1) / length


def cosine(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """One minus the cosine of the angle, from 0 to 2; half if one of them is zero.

    Computed as half the squared distance of the unit vectors: value and gradient are exactly 0 at
    equality.
    """
    gap = unit(student) - unit(teacher)
    return 0.5 * gap.square().sum(-1)


GAPS: Mapping[str, Gap] = {"mse": squared, "normalised_mse": relative, "cosine": cosine}


@terms.register("hidden_state")
class HiddenStateTerm(StateTerm):
    """Distance of projected student states to teacher states, mean over the pairs of layers.

    Sources: Romero et al., "FitNets", 2014, arXiv:1412.6550 (MSE); Sanh et al., "DistilBERT", 2019,
    arXiv:1910.01108 (cosine). The MSE is divided by the teacher's hidden size.
    """

    def __init__(
        self,
        shapes: PairShapes,
        *,
        loss: Literal["mse", "normalised_mse", "cosine"] = "mse",
        layer_map: LayerChoice = "surviving",
    ) -> None:
        """
        Args:
            shapes: Layers and widths of the pair. With equal widths there is no projector.
            loss: `mse`, `normalised_mse` (divided by the teacher state's squared norm) or
                `cosine`; the last two do not depend on the norm of the teacher's states.
            layer_map: `surviving`, `uniform`, `last`, or 0-based pairs [student, teacher]; see
                docs/hidden-states.md.
        """
        super().__init__()
        self.gap = GAPS[loss]
        self.layer_map = chosen_map(layer_map, shapes)
        self.needs = SignalNeeds(layers=frozenset(t for _, t in self.layer_map.pairs))
        self.student_layers = frozenset(s for s, _ in self.layer_map.pairs)
        self.projectors = Projectors(self.student_layers, shapes)

    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        """Mean over the pairs of each token's distance."""
        loss = upcast(student.hidden.new_zeros(len(student.hidden)))
        for student_layer, teacher_layer in self.layer_map.pairs:
            state = self.projectors.project(student_layer, student.layer_hidden[student_layer])
            target = signal.layer_hidden[teacher_layer].detach().to(state.dtype)
            loss = loss + self.gap(state, target)
        return loss / len(self.layer_map.pairs)


def unit(state: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
    """States divided by their norm; zero stays zero."""
    return torch.nn.functional.normalize(state, dim=-1)
