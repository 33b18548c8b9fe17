"""TAID: a target that moves from the student to the teacher during training."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.errors import ConfigError
from limbeck.losses.distributions.base import TeacherDistribution, require_served
from limbeck.losses.divergences.kl import forward_kl
from limbeck.losses.signal import SignalNeeds
from limbeck.losses.terms.base import LearningTerm, LogitTerm, PairShapes, SteppedTerm, terms

Share = Annotated[float, Interval(ge=0, le=1)]


class TaidMemory(nn.Module):
    """State of the target: buffers, saved with every checkpoint.

    Attributes:
        t: Weight of the teacher in the target.
        momentum: Running mean of the loss's relative decrease per step.
        previous: Mean loss of the previous step; infinite before the first.
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(self, start: float) -> None:
        super().__init__()
        self.register_buffer("t", torch.tensor(start))
        self.register_buffer("momentum", torch.tensor(0.0))
        self.register_buffer("previous", torch.tensor(math.inf))


@terms.register("taid")
class TaidTerm(LogitTerm, SteppedTerm, LearningTerm):
    """Forward KL from the student to a target between it and the teacher, nats, from 0 up.

    The target is the softmax of (1 - t) times the student's log-probabilities, held constant, plus
    t times the teacher's; at t = 1 this is forward KL, at t = 0 nothing. t never decreases:
    its lower bound is the line from `start` to `end`, and it grows by rate sigmoid(m) (1 - t) per
    step, with m a running mean of the loss's relative decrease. Multiplied by the temperature
    squared. Its value is not comparable between steps, because the target moves.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", 2025,
    arXiv:2501.16937. Rule and defaults follow public copies of its code, not the authors' own
    file, with three differences: that code updates t after every micro-batch; its loss is the
    cross-entropy with the target, whose relative decrease is smaller than the KL's; and it reads
    the line one step later.
    """

    needs = SignalNeeds(distribution=True)
    memory: TaidMemory

    def __init__(
        self,
        shapes: PairShapes | None = None,
        *,
        steps: Annotated[int, Gt(0)],
        start: Share = 0.4,
        end: Share = 1.0,
        rate: Annotated[float, Interval(ge=0, lt=1)] = 5e-4,
        momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.99,
        temperature: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        """
        Args:
            steps: Optimizer steps after which t has reached `end`.
            start: t in the first step.
            end: Largest t.
            rate: Maximum growth of t per step; 0 keeps it on the line.
            momentum: Decay of the running mean.
            temperature: Divides both models' logits.
        """
        if start > end:
            raise ConfigError(
                f"taid: start must be at most end, because the target moves towards the "
                f"teacher, got start {start} and end {end}. Lower start or raise end."
            )
        self.steps, self.start, self.end = steps, start, end
        self.rate, self.inertia = rate, momentum
        self.temperature = temperature
        self.memory = TaidMemory(start)
        self.line = start

    def set_step(self, step: int) -> None:
        """Set the lower bound of t."""
        self.line = self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    def share(self) -> Float[Tensor, ""]:
        """Weight of the teacher in the target at the current step, on the device."""
        return self.memory.t.clamp(self.line, self.end)

    def update(self, mean: float) -> None:
        """Increase t after an optimizer step with this mean loss."""
        memory, t = self.memory, float(self.share())
        previous = float(memory.previous)
        if math.isfinite(previous) and previous > 0:
            decrease = (previous - mean) / previous
            momentum = self.inertia * float(memory.momentum) + (1 - self.inertia) * decrease
            memory.momentum.fill_(momentum)
            t += self.rate * sigmoid(momentum) * (1 - t)
        memory.t.fill_(min(t, self.end))
        memory.previous.fill_(mean)

    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"],
        teacher: TeacherDistribution | None,
    ) -> Float[Tensor, " N"]:
        """Temperature squared times the divergence of each token."""
        assert teacher is not None, "a term that needs a distribution is not called without one"
        require_served(teacher, "taid")
        pair = teacher.compare(logits, self.temperature)
        t = self.share().to(pair.teacher)
        target = torch.lerp(pair.student.detach(), pair.teacher, t).log_softmax(-1)
        return forward_kl(pair.student, target) * self.temperature**2


def sigmoid(x: float) -> float:
    """The logistic function, for any size of x."""
    return 0.5 * (1 + math.tanh(0.5 * x))
