"""The floor, the ceiling, and what training runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from head.inputs import Inputs
from limbeck.losses import Head, Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.distributions import LazyLogits, TeacherDistribution
from limbeck.losses.head.closed_form import closed_form
from limbeck.losses.head.fused import ChunkBody, Segment, even_chunk, head_and_terms, head_chunk
from limbeck.losses.head.general_form import GeneralForm
from limbeck.losses.head.workspace import Workspace
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm


def weighted(divergence: str, alpha: float, temperature: float) -> list[WeightedTerm]:
    soft = DivergenceTerm(divergence=divergence, temperature=temperature)
    terms = [WeightedTerm("divergence", alpha, soft)]
    if alpha < 1:
        terms.append(WeightedTerm("cross_entropy", 1 - alpha, CrossEntropyTerm()))
    return terms


def view(inputs: Inputs) -> StudentView:
    return StudentView(inputs.hidden, Head(inputs.weight), {}, inputs.targets)


def lazy(inputs: Inputs) -> TeacherDistribution:
    return LazyLogits(inputs.teacher_hidden, Head(inputs.teacher_weight))


def gradients(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs.hidden, inputs.weight]))


def closed(inputs: Inputs, teacher: TeacherDistribution, objective: Objective) -> list[Tensor]:
    """What training runs, with the objective that one step leaves to the next."""
    tokens = torch.tensor(len(inputs.hidden))
    loss, _ = objective(view(inputs), TeacherSignal.from_distribution(teacher), tokens)
    return gradients(loss, inputs)


def general(inputs: Inputs, objective: Objective) -> list[Tensor]:
    """The same with autograd inside a chunk, as other divergences and other heads run."""
    student = view(inputs)
    names, terms = zip(*objective.logit_terms.items(), strict=True)
    weights = [objective.weights[name] for name in names]
    body = GeneralForm(terms, weights, student, lazy(inputs), objective.workspace)
    rows = slice(0, len(inputs.hidden))
    segment = Segment(rows, body, at_most(body, inputs))
    total, _ = head_and_terms(inputs.hidden, student.head, [segment])
    return gradients(total / len(inputs.hidden), inputs)


def at_most(body: ChunkBody, inputs: Inputs) -> int:
    """Tokens of a chunk by training's default budget."""
    return head_chunk("auto", inputs.weight, body.copies, body.scratch_bytes)


def plain(inputs: Inputs, divergence: str, alpha: float, temperature: float) -> list[Tensor]:
    """Whole logits of both models, torch's own losses, and autograd."""
    logits = inputs.hidden @ inputs.weight.t()
    student = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        teacher = inputs.teacher_hidden @ inputs.teacher_weight.t()
        teacher = (teacher / temperature).log_softmax(-1)
    if divergence == "forward_kl":
        soft = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    else:
        assert divergence == "jensen_shannon"
        middle = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0))
        halves = [
            functional.kl_div(middle, side, log_target=True, reduction="batchmean")
            for side in (student, teacher)
        ]
        soft = (halves[0] + halves[1]) / 2
    loss = alpha * temperature**2 * soft
    if alpha < 1:
        loss = loss + (1 - alpha) * functional.cross_entropy(logits, inputs.targets)
    return gradients(loss, inputs)


class Products:
    """The products alone into buffers made beforehand, a chunk at a time, as many as ours has.

    Teacher's logits (unless it is recorded), student's, and the two gradients; the logits stand in
    for their gradient.
    """

    def __init__(self, inputs: Inputs, with_teacher: bool, most: int | None = None) -> None:
        self.inputs, self.with_teacher = inputs, with_teacher
        body = closed_form([CrossEntropyTerm()], [1.0], view(inputs), None, Workspace())
        assert body is not None
        self.chunk = even_chunk(len(inputs.hidden), most or at_most(body, inputs))
        size = self.chunk, len(inputs.weight)
        self.student, self.teacher = torch.zeros(size), torch.zeros(size if with_teacher else 0)
        self.hidden_grad = torch.zeros_like(inputs.hidden)
        self.weight_grad = torch.zeros_like(inputs.weight)

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        hidden, weight, teacher_hidden, teacher_weight, _ = self.inputs
        for start in range(0, len(hidden), self.chunk):
            window = slice(start, start + self.chunk)
            rows = hidden[window]
            if self.with_teacher:
                out = self.teacher[: len(rows)]
                torch.mm(teacher_hidden[window], teacher_weight.t(), out=out)
            logits = torch.mm(rows, weight.t(), out=self.student[: len(rows)])
            torch.mm(logits, weight, out=self.hidden_grad[window])
            self.weight_grad.addmm_(logits.t(), rows)
        return [self.hidden_grad, self.weight_grad]
