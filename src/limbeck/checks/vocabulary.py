"""Checks of token ids, and of the probability on padded rows of the head."""

from __future__ import annotations

import torch

from limbeck.batch import Batch
from limbeck.checks.case import Case
from limbeck.checks.proof import Proof
from limbeck.models import CausalLM, evaluating

MAX_PADDED_PROBABILITY = 1e-4
"""Largest mean probability on the padded rows, which are cut from a head."""


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
