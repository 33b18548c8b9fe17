"""The distillation loss as a module for any training loop."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Gt, Interval
from jaxtyping import Float, Int, Num
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from limbeck.config import HeadBudget
from limbeck.errors import ConfigError
from limbeck.losses.distributions.base import TeacherDistribution
from limbeck.losses.distributions.full import DenseLogits, LazyLogits
from limbeck.losses.objective import Objective
from limbeck.losses.output_head import Head
from limbeck.losses.signal import TeacherSignal
from limbeck.losses.terms.base import StudentView, WeightedTerm
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm
from limbeck.registry import Component

IGNORED = -100
"""Label of a position that does not count, as in Hugging Face's models."""


class LossParts(NamedTuple):
    """A loss and its terms.

    Attributes:
        loss: Call `backward` on it.
        divergence: T^2 D, the mean over scored tokens, unweighted; zero if alpha is.
        cross_entropy: Mean over scored tokens, nats, unweighted.
    """

    loss: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]


class DistillationLoss(nn.Module):
    """Mean over scored tokens of alpha T^2 D(teacher, student) + (1 - alpha) CE.

    It takes hidden states and output heads, not logits, so that logits exist only for a chunk of
    tokens at a time. Its gradient is computed in the forward pass, so `backward` works once. It has
    no parameters. Labels follow Hugging Face: with `[B, T]` labels, position t predicts label t + 1
    and the last position nothing; with `[N]` labels, row i predicts label i. Labels of -100 are not
    scored. Inside autocast the head's products have autocast's dtype.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        temperature: float = 1.0,
        divergence: Component | str = "forward_kl",
        head_budget_mb: HeadBudget = "auto",
    ) -> None:
        """
        Args:
            alpha: Weight of the divergence; the cross-entropy has 1 - alpha.
            temperature: Softens both distributions in the divergence, never in the cross-entropy.
            divergence: Its name, or `{"type": name, **options}`; see `limbeck.losses.divergences`.
            head_budget_mb: Memory for the logits that exist at once; `auto` goes by the vocabulary.

        Raises:
            ConfigError: An option is out of its bounds.
        """
        super().__init__()
        alpha = validated("alpha", alpha, Annotated[float, Interval(ge=0, le=1)])
        temperature = validated("temperature", temperature, Annotated[float, Gt(0)])
        head_budget_mb = validated("head_budget_mb", head_budget_mb, HeadBudget)
        weighted = []
        if alpha > 0:
            term = DivergenceTerm(divergence=divergence, temperature=temperature)
            weighted.append(WeightedTerm("divergence", alpha, term))
        weighted.append(WeightedTerm("cross_entropy", 1 - alpha, CrossEntropyTerm()))
        self.objective = Objective(weighted, head_budget_mb)

    def forward(
        self,
        student_hidden: Float[Tensor, "*batch D"],
        student_head_weight: Float[Tensor, "V D"] | Head,
        labels: Int[Tensor, "*batch"],
        *,
        teacher_hidden: Float[Tensor, "*batch E"] | None = None,
        teacher_head_weight: Float[Tensor, "W E"] | Head | None = None,
        token_weights: Float[Tensor, "*batch"] | None = None,
        step_tokens: int | Num[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss alone; see `parts`."""
        return self.parts(
            student_hidden,
            student_head_weight,
            labels,
            teacher_hidden=teacher_hidden,
            teacher_head_weight=teacher_head_weight,
            token_weights=token_weights,
            step_tokens=step_tokens,
        ).loss

    def parts(
        self,
        student_hidden: Float[Tensor, "*batch D"],
        student_head_weight: Float[Tensor, "V D"] | Head,
        labels: Int[Tensor, "*batch"],
        *,
        teacher_hidden: Float[Tensor, "*batch E"] | None = None,
        teacher_head_weight: Float[Tensor, "W E"] | Head | None = None,
        token_weights: Float[Tensor, "*batch"] | None = None,
        step_tokens: int | Num[Tensor, ""] | None = None,
    ) -> LossParts:
        """The loss and its two terms, already divided by the number of scored tokens.

        Args:
            student_hidden: The student's last hidden states, after its final norm.
            student_head_weight: Its output head: the matrix, or a `Head` with bias and soft-cap.
            labels: Token ids; -100 where a position does not count.
            teacher_hidden: The teacher's last hidden states at the same positions.
            teacher_head_weight: Its output head. If one model has more rows, they are taken to be
                padding, and are left out.
            token_weights: Multiplies the loss at each label; aligned with `labels`.
            step_tokens: Scored tokens of the whole optimizer step, where a step is more than this
                call: gradients of several calls then add up to those of one. Of this call without.

        Raises:
            ConfigError: The teacher is missing, shapes do not fit together, or a label is no token
                of both models.
        """
        scored, targets = aligned(labels)
        student, teacher = as_head(student_head_weight), None
        require_shape("student_hidden", student_hidden, labels, student)
        if token_weights is not None:
            require_shape("token_weights", token_weights, labels)
        size = len(student.weight)
        if teacher_head_weight is not None and teacher_hidden is not None:
            teacher = as_head(teacher_head_weight)
            require_shape("teacher_hidden", teacher_hidden, labels, teacher)
            size = min(size, len(teacher.weight))
        require_tokens(targets, size)
        signal = TeacherSignal()
        if teacher is not None and teacher_hidden is not None:
            hidden = positions_of(teacher_hidden, labels)[scored].detach()
            signal = TeacherSignal.from_distribution(LazyLogits(hidden, first(teacher, size)))
        self._require_teacher(signal.distribution)
        view = StudentView(
            positions_of(student_hidden, labels)[scored],
            first(student, size),
            {},
            targets,
            chosen_weights(token_weights, scored),
        )
        own = torch.tensor(len(targets), device=targets.device)
        share = share_of_step(len(targets), step_tokens)
        loss, shares = self.objective(view, signal, own)
        warn_if_unusable(loss, len(targets), step_tokens)
        soft = shares.get("divergence", torch.zeros_like(shares["cross_entropy"]))
        return LossParts(loss * share, soft * share, shares["cross_entropy"] * share)

    def from_logits(
        self,
        student_logits: Float[Tensor, "*batch V"],
        labels: Int[Tensor, "*batch"],
        teacher_logits: Float[Tensor, "*batch W"] | None = None,
        *,
        step_tokens: int | Num[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """The same loss where logits exist already, by ordinary autograd on all of them at once."""
        scored, targets = aligned(labels)
        require_shape("student_logits", student_logits, labels)
        size = student_logits.shape[-1]
        distribution = None
        if teacher_logits is not None:
            require_shape("teacher_logits", teacher_logits, labels)
            size = min(size, teacher_logits.shape[-1])
            distribution = DenseLogits(positions_of(teacher_logits, labels)[scored][:, :size])
        require_tokens(targets, size)
        self._require_teacher(distribution)
        logits = positions_of(student_logits, labels)[scored][:, :size]
        total = logits[:0].sum()  # zero with a graph, also when nothing is scored
        for name, term in self.objective.logit_terms.items():
            total = total + self.objective.weights[name] * term(logits, targets, distribution).sum()
        warn_if_unusable(total, len(targets), step_tokens)
        return total / max(len(targets), 1) * share_of_step(len(targets), step_tokens)

    def _require_teacher(self, distribution: TeacherDistribution | None) -> None:
        if self.objective.needs.distribution and distribution is None:
            raise ConfigError(
                "A loss with alpha above 0 needs a teacher, and none was given. Pass its hidden "
                "states and head, or its logits; or set alpha to 0."
            )


def aligned(labels: Int[Tensor, "*batch"]) -> tuple[Tensor, Int[Tensor, " N"]]:
    """Mask of the scored positions, and the target token of each of them."""
    shifted = labels[:, 1:] if labels.ndim > 1 else labels
    scored = shifted != IGNORED
    return scored, shifted[scored]


def positions_of(values: Tensor, labels: Tensor) -> Tensor:
    """Values at the positions that predict something: all, or all but a row's last."""
    return values[:, :-1] if labels.ndim > 1 else values


def chosen_weights(weights: Tensor | None, scored: Tensor) -> Float[Tensor, " N"] | None:
    """The weights of the labels that are scored."""
    if weights is None:
        return None
    return (weights[:, 1:] if weights.ndim > 1 else weights)[scored]


def share_of_step(own: int, step_tokens: int | Tensor | None) -> float | Tensor:
    """Fraction of the step's scored tokens that this call has."""
    if step_tokens is None or own == 0:
        return 1.0
    return own / step_tokens


def as_head(head: Tensor | Head) -> Head:
    """A `Head` from a matrix or a `Head`."""
    return head if isinstance(head, Head) else Head(head)


def first(head: Head, size: int) -> Head:
    """A head cut to its first tokens."""
    bias = None if head.bias is None else head.bias[:size]
    return Head(head.weight[:size], bias, head.transform)


def require_shape(name: str, values: Tensor, labels: Tensor, head: Head | None = None) -> None:
    """Refuse values at other positions than the labels, and hidden states as wide as no head."""
    if values.shape[: labels.ndim] != labels.shape:
        raise ConfigError(
            f"{name} must have one entry for each label, but its shape is {tuple(values.shape)}, "
            f"and that of the labels {tuple(labels.shape)}. Hidden states come before the head; "
            "labels are not shifted."
        )
    if head is not None and values.shape[-1] != head.weight.shape[-1]:
        raise ConfigError(
            f"{name} must be as wide as its output head, a matrix [V, D], but its shape is "
            f"{tuple(values.shape)}, and that of the head {tuple(head.weight.shape)}. Do both "
            "belong to one model?"
        )


def require_tokens(targets: Int[Tensor, " N"], size: int) -> None:
    """Refuse labels that are not tokens of both models."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < size:
        raise ConfigError(
            f"Labels must be -100 or ids below {size}, the tokens both models have, but they reach "
            f"from {int(targets.min())} to {int(targets.max())}. Do the two share a tokenizer?"
        )


def warn_if_unusable(loss: Tensor, num_scored: int, step_tokens: int | Tensor | None) -> None:
    """Warn of a loss that trains nothing, or that is not a number.

    Nothing scored is expected where a call is a share of a step, so it is silent there.
    """
    if num_scored == 0 and step_tokens is None:
        warnings.warn(
            "No label is scored, all are -100: the loss is 0 and nothing is learned. Were prompts "
            "longer than the sequence? Give step_tokens if this call is a share of a step.",
            stacklevel=3,
        )
    if not bool(loss.isfinite()):
        warnings.warn(
            f"The loss is {loss.item()}: hidden states, heads or logits hold values that are not "
            "finite. Skip this optimizer step, and look at learning rate and dtype.",
            stacklevel=3,
        )


def validated(name: str, value: object, bounds: Any) -> Any:
    """An option converted to its declared type."""
    try:
        return TypeAdapter(bounds).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ConfigError(f"{name}: {message}, got {value!r}.") from None
