"""Base classes of terms: one number per scored token, from logits or from hidden states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.config import HeadBudget
from limbeck.layer_map import LayerMap
from limbeck.losses.distributions.base import Rows, TeacherDistribution
from limbeck.losses.output_head import Head
from limbeck.losses.signal import Projections, SignalNeeds, TeacherSignal
from limbeck.registry import Registry


@dataclass(frozen=True)
class StudentView:
    """The student's forward pass at the N scored positions, before its output head.

    Attributes:
        hidden: Last hidden states, after the final norm.
        head: Output head. Called on a chunk at a time, so N x V logits never exist at once.
        token_weights: Multiplies every term at each position; None is 1 everywhere. The sum of the
            terms is still divided by the number of scored tokens, not by the sum of the weights.
        segments: Segment number of each position, non-decreasing, in host memory; see
            `Batch.segments`. May be None if no term compares positions with each other.
        head_budget_mb: Memory for the logits that a term computes itself.
    """

    hidden: Float[Tensor, "N D"]
    head: Head
    layer_hidden: Mapping[int, Float[Tensor, "N D"]]
    targets: Int[Tensor, " N"]
    token_weights: Float[Tensor, " N"] | None = None
    segments: Int[Tensor, " N"] | None = None
    layer_projections: Mapping[int, Projections] = field(default_factory=dict)
    head_budget_mb: HeadBudget = "auto"

    def weigh(self, values: Float[Tensor, " n"], window: Rows) -> Float[Tensor, " n"]:
        """Values at some of the positions, each times its position's weight."""
        if self.token_weights is None:
            return values
        return values * self.token_weights[window].to(values.dtype)


@dataclass(frozen=True)
class PairShapes:
    """Layers and widths of the two models, from which terms are built.

    Attributes:
        layer_map: Pairs (student layer, teacher layer) from the way the student was initialised.
    """

    student_layers: int
    teacher_layers: int
    student_width: int
    teacher_width: int
    layer_map: LayerMap


class LogitTerm(ABC):
    """One number per scored token, from logits; smaller is better.

    A term does not average, weight, mask or chunk: it sees a chunk of rows at a time and holds no
    parameters.
    """

    needs = SignalNeeds()
    """What `__call__` reads from the teacher."""

    @abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        targets: Int[Tensor, " N"],
        teacher: TeacherDistribution | None,
    ) -> Float[Tensor, " N"]:
        """Loss of each of N tokens.

        Args:
            logits: The student's logits, computed once and shared by all logit terms.
            targets: Token id each position should predict.
            teacher: The teacher's distribution at the same tokens; never None for a term whose
                `needs` has one: where the teacher has none, the term is 0 without being called.
        """


class StateTerm(nn.Module, ABC):
    """One number per scored token, from hidden states of the whole micro-batch.

    It is a module because it may own parameters (a projector); these are sharded, optimised and
    saved with the student's.
    """

    needs = SignalNeeds()
    """What `forward` reads from the teacher."""

    student_layers: frozenset[int] = frozenset()
    """Student layers whose block outputs `forward` reads, 0-based."""

    student_projections: frozenset[int] = frozenset()
    """Student layers whose queries, keys and values `forward` reads, 0-based."""

    @abstractmethod
    def forward(self, student: StudentView, signal: TeacherSignal) -> Float[Tensor, " N"]:
        """Loss of each of N tokens."""


class SteppedTerm(ABC):
    """A term whose hyperparameters are a pure function of the step."""

    @abstractmethod
    def set_step(self, step: int) -> None:
        """Set the hyperparameters of an optimizer step, counted from 0."""


class LearningTerm(ABC):
    """A term with a state that depends on earlier losses; the state is saved in checkpoints."""

    memory: nn.Module
    """The state: buffers only, no parameters."""

    @abstractmethod
    def update(self, mean: float) -> None:
        """Update the state after an optimizer step; not called when the step was skipped.

        Args:
            mean: The term's mean over the step's scored tokens, equal on every rank.
        """


Term = LogitTerm | StateTerm
terms: Registry[Term] = Registry("objective term", package="limbeck.losses.terms")
"""Components take `(shapes: PairShapes, *, options...)`."""


class WeightedTerm(NamedTuple):
    """A term, its weight, and the name its value is logged under.

    A weight that changes is a pure function of the optimizer step, counted from 0.
    """

    name: str
    weight: float | Callable[[int], float]
    term: Term
