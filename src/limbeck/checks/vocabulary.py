"""Proofs about ids: that the text's exist in both models, and what lies beyond them."""

from __future__ import annotations

import torch

from limbeck.batch import Batch
from limbeck.checks.case import Case
from limbeck.checks.proof import Proof
from limbeck.models import CausalLM, evaluating

MAX_TEACHER_MASS = 1e-4
"""Mean probability a teacher may leave on rows that are cut, before its distribution is another."""


def vocabulary_proof(case: Case) -> Proof:
    """Both models have a row for every id the tokenizers share, and the text has no other id."""
    size = case.vocabulary.size
    rows = {who: model.vocabulary_rows for who, model in case.models}
    told = ", ".join(f"{who} {n:,} rows ({n - size:,} padded)" for who, n in rows.items())
    same = "one tokenizer" if case.vocabulary.same_tokenizer else "tokenizers that cut differently"
    return Proof(
        "vocabulary",
        case.largest_token_id < size <= min(rows.values()),
        f"{size:,} ids, {same}; {told}; largest id in the text {case.largest_token_id:,}",
        "every id means the same token to both, and both heads are cut to these ids",
    )


def padded_rows_proof(who: str, model: CausalLM, batch: Batch) -> Proof:
    """The probability a model leaves on rows that stand for no shared token is negligible.

    A teacher's is refused, because its distribution without them is another one. A student's is a
    warning: the loss cannot see it, so training does not take it away.

    Args:
        who: `teacher` or `student`.
        model: The model.
        batch: Where it is measured.
    """
    with torch.no_grad(), evaluating(model):
        hidden, _ = model(batch)
        mass = float(model.padded_mass(model.whole_head(hidden)).mean())
    return Proof(
        f"padded rows of the {who}",
        mass <= MAX_TEACHER_MASS,
        f"mean probability {mass:.1e} (at most {MAX_TEACHER_MASS:.0e})",
        "rows that stand for no shared token are cut before the softmax"
        + ("" if who == "teacher" else "; sampling, evaluation and export mask them"),
        decides=who == "teacher",
    )
