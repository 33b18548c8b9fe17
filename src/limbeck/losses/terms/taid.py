"""A target that moves from the student to the teacher as training goes on."""

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
    """What a run must remember of its target: buffers, saved with every checkpoint.

    Attributes:
        t: Teacher's share of the target.
        momentum: Running mean of the loss's relative fall from step to step.
        previous: Mean of the last step; infinite before the first.
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
    t times the teacher's; at t = 1 this is forward KL, at t = 0 nothing. t never falls: it is at
    least on the line from `start` to `end`, and runs ahead of it by
    rate sigmoid(m) (1 - t) a step, m being a running mean of the loss's relative fall. Times the
    temperature squared. Its value is not comparable between steps, because the target moves.

    Source: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation", 2025,
    arXiv:2501.16937. Rule and defaults are those of public copies of its code (the authors' own
    file was not at hand), but for three things: it moves t after every micro-batch, by that one's
    loss; its loss is the cross-entropy with the target, which falls by a smaller share than the KL;
    and it reads the line a step later.
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
            shapes: Not needed; the same signature as every term's.
            steps: Optimizer steps after which t is at `end` at the latest.
            start: t in the first step.
            end: Greatest t.
            rate: How far t may run ahead in a step; 0 keeps it on the line.
            momentum: How slowly the running mean follows.
            temperature: Divides both models' logits.

        Raises:
            ConfigError: The target would move backwards.
        """
        if start > end:
            raise ConfigError(
                f"A target must move towards the teacher, but 'taid' starts at {start} and ends at "
                f"{end}. Make `start` at most `end`."
            )
        self.steps, self.start, self.end = steps, start, end
        self.rate, self.inertia = rate, momentum
        self.temperature = temperature
        self.memory = TaidMemory(start)
        self.line = start

    def set_step(self, step: int) -> None:
        """Where the line is in this step."""
        self.line = self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    def share(self) -> Float[Tensor, ""]:
        """Teacher's share of the target in the present step, on the device."""
        return self.memory.t.clamp(self.line, self.end)

    def learn(self, mean: float) -> None:
        """Move t, after a step whose mean was this."""
        memory, t = self.memory, float(self.share())
        previous = float(memory.previous)
        if math.isfinite(previous) and previous > 0:
            fall = (previous - mean) / previous
            momentum = self.inertia * float(memory.momentum) + (1 - self.inertia) * fall
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
        """Temperature squared times the divergence of each token.

        Raises:
            ConfigError: The teacher's form cannot be interpolated.
        """
        assert teacher is not None, "a term that needs a distribution is not called without one"
        require_served(teacher, "taid")
        pair = teacher.compare(logits, self.temperature)
        t = self.share().to(pair.teacher)
        target = torch.lerp(pair.student.detach(), pair.teacher, t).log_softmax(-1)
        return forward_kl(pair.student, target) * self.temperature**2


def sigmoid(x: float) -> float:
    """The logistic function, for any size of x."""
    return 0.5 * (1 + math.tanh(0.5 * x))
