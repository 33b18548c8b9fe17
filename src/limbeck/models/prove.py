"""Checks on a loaded model: head, packed documents, finite weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.batch import Batch, Window
from limbeck.errors import ConfigError, DataError
from limbeck.models.causal_lm import CausalLM
from limbeck.models.modes import evaluating

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference of hidden states by their format, relative to their size. Rounding over all
layers stays well below; a row of two documents read as one lies well above."""

HEAD_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
"""Largest difference of logits by their format, relative to the largest of them. Both come from the
same hidden states, so only one product is rounded, and even a soft-cap that hardly bends them is
seen."""

PIECES = [5, 7, 4]
"""Lengths of two documents and of the padding after them."""


def prove_head(model: CausalLM) -> None:
    """Check that decoder and head, called apart, give the whole model's logits on a few tokens."""
    error, bound = head_error(model, _tokens(model, 0, 8)[None])
    if not error <= bound:  # so that NaN fails too
        require_finite(model)
        raise ConfigError(
            f"The head of a {model.family} model, called apart from it, must give the model's own "
            f"logits, but they differ by up to {error:.3g} of the largest (allowed: {bound:.3g}). "
            "limbeck does not know what this family does after its head: choose another model, or "
            "add the family to limbeck.models.heads."
        )


def require_finite(model: CausalLM) -> None:
    """Refuse a model with weights that are not numbers."""
    for name, weight in model.hf_model.named_parameters():
        if bad := int((~weight.isfinite()).sum()):
            raise DataError(
                f"Weights must be finite numbers, but {name} of this {model.family} model holds "
                f"{bad:,} that are not (of {weight.numel():,}). Fetch or save the model again."
            )


def head_error(model: CausalLM, input_ids: Int[Tensor, "B T"]) -> tuple[float, float]:
    """Largest difference between head(decoder) and the whole model's logits.

    Returns:
        The largest difference over the real tokens, relative to the largest logit; and what the
        format they are computed in allows.
    """
    with torch.no_grad(), evaluating(model):
        whole = model.hf_model(input_ids=input_ids, use_cache=False).logits
        whole = whole[..., : model.vocabulary_size].float()
        logits = model.logits(input_ids)
        gap = (logits.float() - whole).abs().max()
    return float(gap / whole.abs().max()), HEAD_TOLERANCE[logits.dtype]


def prove_documents_apart(model: CausalLM) -> None:
    """Check that pieces packed into one row, and padding, do not see each other."""
    _refuse_without_positions(model)
    pieces = torch.split(_tokens(model, 1, sum(PIECES)), PIECES)
    error, bound, seen = neighbours_seen(model, pieces)
    if not error <= bound or seen > 0:
        raise ConfigError(
            f"Texts that share a row must not see each other, but in this {model.family} model "
            f"they do: hidden states differ by {error:.3g} of their size from those "
            f"of the text alone (allowed: {bound:.3g}), and by up to {seen:.3g} when a "
            "neighbour changes. The model does not read document borders from position_ids; "
            "choose a model with attention in every layer, as Llama, Qwen, Gemma or Mistral."
        )


def neighbours_seen(
    model: CausalLM, pieces: Sequence[Int[Tensor, " _"]]
) -> tuple[float, float, float]:
    """How much pieces of text in one row affect each other; 0 if they are kept apart.

    Args:
        pieces: At least three; the first and the last are the neighbours of the others.

    Returns:
        The largest difference of a hidden state from that of its piece alone, relative to its size,
        where only rounding may differ; what the format they are computed in allows; and the largest
        change of those between the neighbours when every token of the neighbours changes, where
        nothing may.
    """
    first, *inner, last = pieces
    between = slice(len(first), -len(last))
    others = [(piece + 1) % model.vocabulary_size for piece in (first, last)]
    with torch.no_grad(), evaluating(model):
        states = _states(model, [pieces])
        # Of one shape, so that both are rounded alike. Each pass gathers a sharded model anew.
        beside_others = _states(model, [[others[0], *inner, others[1]]]).float()
        alone = _states(model, [[piece] for piece in pieces]).float()
    packed = states.float()
    error = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max()
    seen = float((beside_others - packed)[between].abs().max())
    return float(error), TOLERANCE[states.dtype], seen


def _refuse_without_positions(model: CausalLM) -> None:
    takes = inspect.signature(model.decoder.forward).parameters
    if "position_ids" not in takes:
        raise ConfigError(
            f"A model must read document borders from position_ids, but {model.family} models take "
            f"only {', '.join(takes)}. Choose one that does, as Llama, Qwen, Gemma or Mistral."
        )


def _tokens(model: CausalLM, seed: int, count: int) -> Int[Tensor, " T"]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocabulary_size, (count,), generator=generator)
    return ids.to(model.device)


def _states(model: CausalLM, rows: Sequence[Sequence[Int[Tensor, " _"]]]) -> Float[Tensor, "T D"]:
    """Last hidden states of pieces in rows, each piece with positions of its own."""
    windows = [
        [
            # Every position is read, and no target: the last one may be any.
            Window(np.append(piece.cpu().numpy(), 0), np.ones(len(piece), dtype=np.bool_), number)
            for number, piece in enumerate(pieces)
        ]
        for pieces in rows
    ]
    hidden: Tensor = model(Batch.packed(windows).to(model.device))[0]
    return hidden
