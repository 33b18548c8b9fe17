"""What every form starts from: hidden states, heads and targets of one size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.losses.distributions import TopK

KEPT = 32
"""Tokens a position of the stored teacher."""


class Shape(NamedTuple):
    """Sizes of a pair of models."""

    vocabulary: int
    width: int
    teacher_width: int


SHAPES = {
    "small": Shape(49_152, 576, 576),
    "large": Shape(128_256, 2_048, 4_096),
    "tiny": Shape(1_000, 32, 48),
}


class Inputs(NamedTuple):
    """The tensors, float32; the first two are to be trained."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor


def make_inputs(shape: Shape, tokens: int) -> Inputs:
    """Random hidden states and heads whose logits spread like a language model's (about 3)."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, shape.width)
    weight = torch.randn(shape.vocabulary, shape.width).mul_(3 / shape.width**0.5)
    teacher_hidden = torch.randn(tokens, shape.teacher_width)
    teacher_weight = torch.randn(shape.vocabulary, shape.teacher_width)
    teacher_weight.mul_(3 / shape.teacher_width**0.5)
    targets = torch.randint(shape.vocabulary, (tokens,))
    trained = hidden.requires_grad_(), weight.requires_grad_()
    return Inputs(*trained, teacher_hidden, teacher_weight, targets)


def recorded(inputs: Inputs, temperature: float) -> TopK:
    """The same teacher as a store holds it: its top tokens, and the mass of the others."""
    parts = []
    for rows in inputs.teacher_hidden.split(64):
        parts.append(TopK.from_logits(rows @ inputs.teacher_weight.t(), KEPT, temperature))
    ids, logprobs, tails = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("ids", "logprobs", "tail_logprob")
    )
    return TopK(ids, logprobs, tails, temperature)
