"""What must be true of a model before limbeck computes with it, tried on the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.models.causal_lm import CausalLM

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference of hidden states by number format, relative to their size. Rounding over all
layers stays well below; a row of two documents read as one lies well above."""

HEAD_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
"""Largest difference of logits, relative to the largest of them. Both come from the same hidden
states, so only one product is rounded, and even a soft-cap that hardly bends them is seen."""

PIECES = (5, 7, 4)
"""Lengths of two documents and of the padding after them."""


def prove_head(model: CausalLM) -> None:
    """Check that decoder and head, called apart, give the whole model's logits on a few tokens.

    Raises:
        ConfigError: They do not, so the family does something after its head that limbeck does
            not know.
    """
    with _quiet(model):
        ids = _tokens(model, 0, 8)[None]
        size = model.vocabulary_size
        whole = model.hf_model(input_ids=ids, use_cache=False).logits[..., :size].float()
        difference = (model.logits(ids).float() - whole).abs().max()
        bound = HEAD_TOLERANCE[model.hf_model.dtype] * whole.abs().max()
    if not difference <= bound:  # so that NaN fails too
        raise ConfigError(
            f"The head of a {model.family} model, called apart from it, must give the model's own "
            f"logits, but they differ by up to {float(difference):.3g} (allowed: "
            f"{float(bound):.3g}). limbeck does not know what this family does after its head: "
            "choose another model, or add the family to limbeck.models.heads."
        )


def prove_documents_apart(model: CausalLM) -> None:
    """Check that pieces packed into one row, and padding, do not see each other.

    A piece must give the hidden states it gives alone, and they must not change at all when the
    tokens of the other pieces do.

    Raises:
        ConfigError: They do, so rows of this model cannot hold more than one piece.
    """
    _refuse_without_positions(model)
    with _quiet(model):
        ids = _tokens(model, 1, sum(PIECES))
        pieces = torch.split(ids, list(PIECES))
        packed = _packed(model, ids)
        alone = torch.cat([_alone(model, piece) for piece in pieces])
        other = _tokens(model, 2, sum(PIECES))
        other[PIECES[0] : -PIECES[-1]] = pieces[1]
        seen = (_packed(model, other) - packed)[PIECES[0] : -PIECES[-1]].abs().max()
        difference = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max()
    bound = TOLERANCE[model.hf_model.dtype]
    if not difference <= bound or seen > 0:
        raise ConfigError(
            f"Texts that share a row must not see each other, but in this {model.family} model "
            f"they do: hidden states differ by {float(difference):.3g} of their size from those "
            f"of the text alone (allowed: {bound:.3g}), and by up to {float(seen):.3g} when a "
            "neighbour changes. The model does not read document borders from position_ids; "
            "choose a model with attention in every layer, as Llama, Qwen, Gemma or Mistral."
        )


def _refuse_without_positions(model: CausalLM) -> None:
    takes = inspect.signature(model.decoder.forward).parameters
    if "position_ids" not in takes:
        raise ConfigError(
            f"A model must read document borders from position_ids, but {model.family} models take "
            f"only {', '.join(takes)}. Choose one that does, as Llama, Qwen, Gemma or Mistral."
        )


@contextmanager
def _quiet(model: CausalLM) -> Iterator[None]:
    """Without dropout and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _tokens(model: CausalLM, seed: int, count: int) -> Int[Tensor, " T"]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocabulary_size, (count,), generator=generator)
    return ids.to(model.hf_model.device)


def _packed(model: CausalLM, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
    positions = torch.cat([torch.arange(length, device=ids.device) for length in PIECES])
    return _states(model, ids, positions)


def _alone(model: CausalLM, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
    return _states(model, ids, torch.arange(len(ids), device=ids.device))


def _states(
    model: CausalLM, ids: Int[Tensor, " T"], positions: Int[Tensor, " T"]
) -> Float[Tensor, "T D"]:
    output = model.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    last: Tensor = output.last_hidden_state
    return last[0].float()
