"""Checks of the models on the user's text: token ids, heads, documents packed into one row."""

from __future__ import annotations

import torch

from limbeck.batch import Batch
from limbeck.checks.case import Case
from limbeck.checks.proof import Proof
from limbeck.models import (
    CausalLM,
    evaluating,
    head_error,
    neighbours_seen,
)

NUM_POSITIONS = 64
"""Positions whose logits are compared."""

NUM_TOKENS = 12
"""Tokens of each text packed into the row."""

MAX_PADDED_PROBABILITY = 1e-4
"""Largest mean probability on the padded rows, which are cut from a head."""


def head_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """Decoder and head, called separately, give the full model's logits on the user's text.

    Args:
        batch: Its first row is read, as one text.
    """
    ids = batch.input_ids[:1, :NUM_POSITIONS]
    error, allowed = head_error(model, ids)
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
    error, allowed, seen = neighbours_seen(model, [first, second, first])
    return Proof(
        f"documents apart in the {who}",
        error <= allowed and seen == 0,
        f"{error:.1e} from the text alone (allowed {allowed:.0e}); {seen:.0e} when its neighbours "
        "change (allowed 0)",
        "texts packed into one row do not see each other, so packing changes speed only",
    )


def vocabulary_proof(case: Case) -> Proof:
    """Both models have a row for every id the tokenizers share, and the text has no other id."""
    size = case.vocabulary.size
    rows = {who: model.vocabulary_rows for who, model in case.models}
    counts = ", ".join(f"{who} {n:,} rows ({n - size:,} padded)" for who, n in rows.items())
    same = "one tokenizer" if case.vocabulary.same_tokenizer else "tokenizers that cut differently"
    return Proof(
        "vocabulary",
        case.largest_token_id < size <= min(rows.values()),
        f"{size:,} ids, {same}; {counts}; largest id in the text {case.largest_token_id:,}",
        "every id means the same token to both, and both heads are cut to these ids",
    )


def padded_rows_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """The probability on padded rows is negligible.

    Otherwise a teacher is refused, because cutting the rows changes its distribution. For a student
    it is a warning: the loss does not see these rows, so training does not change it.
    """
    with torch.no_grad(), evaluating(model):
        hidden, _ = model(batch)
        probability = float(model.padded_mass(model.whole_head(hidden)).mean())
    return Proof(
        f"padded rows of the {who}",
        probability <= MAX_PADDED_PROBABILITY,
        f"mean probability {probability:.1e} (at most {MAX_PADDED_PROBABILITY:.0e})",
        "rows that stand for no shared token are cut before the softmax"
        + ("" if who == "teacher" else "; sampling, evaluation and export mask them"),
        decides=who == "teacher",
    )
