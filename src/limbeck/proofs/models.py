"""Proofs about one model: its head, and texts that share a row."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.batch import Batch
from limbeck.models import CausalLM
from limbeck.models.prove import TOLERANCE
from limbeck.proofs.case import at_rest, part
from limbeck.proofs.proof import Proof, distance

READ = 64
"""Positions whose logits are compared."""

PIECE = 12
"""Tokens of each of two texts that are put into one row."""


def head_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """Decoder and head, called apart, give the whole model's logits on the user's text.

    Args:
        who: `teacher` or `student`.
        model: The model.
        batch: Its first row is read.
    """
    row = part(batch, slice(0, 1), slice(0, READ))
    row = replace(row, scored=torch.ones_like(row.scored))
    with torch.no_grad(), at_rest(model):
        hidden, _ = model(row)
        apart = model.head(hidden)
        whole = model.hf_model(
            input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False
        ).logits[0]
    error = distance(apart.float(), whole[:, : model.vocabulary_size].float())
    allowed = TOLERANCE[model.hf_model.dtype]
    return Proof(
        f"head of the {who}",
        error <= allowed,
        f"{error:.1e} of the largest of {apart.numel():,} logits (allowed {allowed:.0e})",
        f"head(hidden) is what {model.family} itself computes, so the loss is taken on the "
        f"{who}'s true logits",
    )


def documents_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """A text in the middle of a row gives the hidden states it gives alone.

    And they do not change at all when the texts beside it do.

    Args:
        who: `teacher` or `student`.
        model: The model.
        batch: The beginnings of its first and last row are put into one row.
    """
    length = min(PIECE, batch.input_ids.shape[1])
    first, second = batch.input_ids[0, :length], batch.input_ids[-1, :length]
    other = (first + 1) % model.vocabulary_size
    with torch.no_grad(), at_rest(model):
        packed = states(model, [first, second, first])[length : 2 * length]
        beside_others = states(model, [other, second, other])[length : 2 * length]
        alone = states(model, [second])
    seen = float((packed - beside_others).abs().max())
    error = float(((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    allowed = TOLERANCE[model.hf_model.dtype]
    return Proof(
        f"documents apart in the {who}",
        error <= allowed and seen == 0,
        f"{error:.1e} from the text alone (allowed {allowed:.0e}); {seen:.0e} when its neighbours "
        "change (allowed 0)",
        "texts packed into one row do not see each other, so packing changes speed only",
    )


def states(model: CausalLM, pieces: list[Tensor]) -> Float[Tensor, "T D"]:
    """Last hidden states of pieces in one row, each with positions of its own."""
    ids = torch.cat(pieces)[None]
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])[None].to(ids.device)
    everything = torch.ones_like(ids, dtype=torch.bool)
    hidden, _ = model(Batch(ids, ids, everything, positions, torch.zeros_like(ids)))
    last: Tensor = hidden.float()
    return last
