"""Calibration text, and the loss of a pruned model relative to its teacher on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses.head.fused import chunks
from limbeck.models import CausalLM, evaluating

CHUNK = 256
"""Scored tokens whose logits exist at once."""


@runtime_checkable
class CalibrationText(Protocol):
    """What calibration needs from a data set; `TextData` is one."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts about the data set, `path` among them."""

    def row_length(self, row: int) -> int:
        """Positions of a row."""

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers."""


class Cost(NamedTuple):
    """Losses of a model on the calibration text, nats a token.

    Attributes:
        forward_kl: KL(teacher || model), the teacher unpruned.
        cross_entropy: Of the text itself.
    """

    forward_kl: float
    cross_entropy: float


@dataclass(frozen=True)
class Calibration:
    """Rows of text, and the teacher's last hidden states at their scored positions.

    Hidden states are kept instead of distributions: D numbers a token instead of V, and exact.

    Attributes:
        teacher: The whole model, in eval mode.
        batches: One row each, on its device.
    """

    teacher: CausalLM
    batches: tuple[Batch, ...]
    states: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Scored tokens of all rows."""
        return sum(len(state) for state in self.states)

    def cost(self, model: CausalLM) -> Cost:
        """Forward KL to the teacher and cross-entropy of a model."""
        with torch.no_grad(), evaluating(model):
            pairs = zip(self.batches, self.states, strict=True)
            parts = [costs(model, [model(b)[0]], (self.teacher, s), b) for b, s in pairs]
        total = torch.stack(parts).sum(0) / self.num_tokens
        return Cost(*total[0].tolist())


def calibrate(
    teacher: CausalLM, data: CalibrationText, tokens: int, *, held_out: bool = False
) -> Calibration:
    """The first rows of a text with at least `tokens` positions, or the rows after them."""
    device = teacher.hf_model.device
    first = len(rows_of(data, tokens)) if held_out else 0
    batches = [data.batch([row]).to(device) for row in rows_of(data, tokens, first)]
    batches = [batch for batch in batches if batch.scored.any()]
    if not batches:
        raise ConfigError(
            f"Calibration text must have at least {2 * tokens:,} tokens, one half to measure parts "
            f"on and one to compare students on, and {data.facts['path']} has "
            f"{sum(map(data.row_length, range(data.num_rows))):,} in {data.num_rows:,} rows. Use "
            "more text, or lower the number of tokens."
        )
    with torch.no_grad(), evaluating(teacher):
        states = tuple(teacher(batch)[0] for batch in batches)
    return Calibration(teacher, tuple(batches), states)


def rows_of(data: CalibrationText, tokens: int, first: int = 0) -> list[int]:
    """Rows from `first` on with at least `tokens` positions; all of them if there are fewer."""
    rows, left = [], tokens
    for row in range(first, data.num_rows):
        if left <= 0:
            break
        rows.append(row)
        left -= data.row_length(row)
    return rows


def costs(
    model: CausalLM,
    states: Sequence[Float[Tensor, "N D"]],
    reference: tuple[CausalLM, Float[Tensor, "N E"]],
    batch: Batch,
) -> Float[Tensor, "C 2"]:
    """Forward KL and cross-entropy of a batch, summed over its scored tokens, in float64.

    Args:
        states: Last hidden states of C variants; the teacher's distribution serves them all.
        reference: The teacher and its last hidden states.
    """
    teacher, teacher_states = reference
    targets = batch.targets()
    size = min(model.vocabulary_size, teacher.vocabulary_size)
    totals = torch.zeros(len(states), 2, dtype=torch.float64)
    for window in chunks(len(targets), CHUNK):
        logits = teacher.head(teacher_states[window])[:, :size].float()
        p = logits.softmax(-1)
        own = logits.logsumexp(-1) - vecdot(p, logits)
        for at, state in enumerate(states):
            logits = model.head(state[window])[:, :size].float()
            normalizer = logits.logsumexp(-1)
            forward_kl = normalizer - vecdot(p, logits) - own
            cross_entropy = normalizer - logits.gather(1, targets[window, None]).squeeze(1)
            for column, loss in enumerate((forward_kl, cross_entropy)):
                totals[at, column] += loss.double().sum().cpu()
    return totals
