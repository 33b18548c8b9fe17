"""Checks of one model on the user's text: its head, and documents packed into one row."""

from __future__ import annotations

from limbeck.batch import Batch
from limbeck.checks.proof import Proof
from limbeck.models import HEAD_TOLERANCE, TOLERANCE, CausalLM, head_error, neighbours_seen

NUM_POSITIONS = 64
"""Positions whose logits are compared."""

NUM_TOKENS = 12
"""Tokens of each text packed into the row."""


def head_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """Decoder and head, called separately, give the full model's logits on the user's text.

    Args:
        batch: Its first row is read, as one text.
    """
    ids = batch.input_ids[:1, :NUM_POSITIONS]
    error = head_error(model, ids)
    allowed = HEAD_TOLERANCE[model.hf_model.dtype]
    return Proof(
        f"head of the {who}",
        error <= allowed,
        f"{error:.1e} of the largest of {ids.numel() * model.vocabulary_size:,} logits "
        f"(allowed {allowed:.0e})",
        f"head(hidden) is what {model.family} itself computes, so the loss is taken on the "
        f"{who}'s true logits",
    )


def documents_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """A document in a packed row has the same hidden states as alone.

    They do not change at all when the neighbouring documents do.

    Args:
        batch: The starts of its first and last row are packed into one row.
    """
    length = min(NUM_TOKENS, batch.input_ids.shape[1])
    first, second = batch.input_ids[0, :length], batch.input_ids[-1, :length]
    error, seen = neighbours_seen(model, [first, second, first])
    allowed = TOLERANCE[model.hf_model.dtype]
    return Proof(
        f"documents apart in the {who}",
        error <= allowed and seen == 0,
        f"{error:.1e} from the text alone (allowed {allowed:.0e}); {seen:.0e} when its neighbours "
        "change (allowed 0)",
        "texts packed into one row do not see each other, so packing changes speed only",
    )
