"""The student and its objective as one module."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.losses import Objective, StudentView, TeacherSignal
from limbeck.models.causal_lm import CausalLM
from limbeck.models.projections import captured_projections


class Distiller(nn.Module):
    """The student and its objective as one module.

    One module means one FSDP root, one optimizer and one checkpoint: a term's projectors are
    handled like the student's own weights, and the head is gathered when the loss needs it.
    """

    def __init__(self, student: CausalLM, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(
        self, batch: Batch, signal: TeacherSignal, step_tokens: Int[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss share and metric shares of one micro-batch; see `Objective.forward`."""
        loss, shares = self.objective(self.view(batch), signal, step_tokens)
        return loss, shares

    def view(self, batch: Batch) -> StudentView:
        """The student's forward pass, with everything that the objective's terms read."""
        with captured_projections(
            self.student, batch, self.objective.student_projections
        ) as projections:
            hidden, layer_hidden = self.student(batch, self.objective.student_layers)
        return StudentView(
            hidden,
            self.student.head,
            layer_hidden,
            batch.targets(),
            token_weights=batch.token_weights(),
            segments=batch.segments(),
            layer_projections=projections,
        )
