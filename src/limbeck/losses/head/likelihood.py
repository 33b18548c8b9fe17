"""Log-likelihoods of tokens under a head, without all of its logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.config import HeadBudget
from limbeck.losses.distributions.base import log_softmax
from limbeck.losses.head.fused import chunks, head_chunk
from limbeck.losses.output_head import Head
from limbeck.losses.signal import ChunkLikelihoods, TeacherSignal

COPIES = 4
"""Approximate number of arrays of a chunk's logits that exist at once."""


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    head: Head,
    targets: Int[Tensor, " N"],
    head_budget_mb: HeadBudget = "auto",
) -> Float[Tensor, " N"]:
    """Log-likelihood of each target, nats.

    Differentiable: the logits of a chunk of tokens are computed again in the backward pass, so that
    a row costs four products with the head.
    """
    rows = head_chunk(head_budget_mb, head.weight, COPIES)
    found = [
        checkpoint(
            chunk_logprobs,
            hidden[window],
            head,
            targets[window],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for window in chunks(len(targets), rows)
    ]
    return torch.cat([hidden.new_zeros(0), *found])


@torch.no_grad()
def with_likelihoods(
    signal: TeacherSignal, hidden: Float[Tensor, "N D"], head: Head, targets: Int[Tensor, " N"]
) -> TeacherSignal:
    """A teacher's signal with its log-likelihoods of the text, every token a chunk of its own."""
    chunk_of = torch.arange(len(targets), device=targets.device)
    likelihoods = ChunkLikelihoods(chunk_of, token_logprobs(hidden, head, targets))
    return replace(signal, likelihoods=likelihoods)


def chunk_logprobs(
    hidden: Float[Tensor, "n D"], head: Head, targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The same for a few tokens, with all of their logits."""
    return log_softmax(head(hidden), 1.0).gather(-1, targets[:, None])[:, 0]
