"""Tokenizers: loading, identity by hash, and the proof that two vocabularies are the same."""

from limbeck.tokenizers.alignment import Aligner, Alignment
from limbeck.tokenizers.conversations import Rendering, align_conversation, part_of
from limbeck.tokenizers.coverage import MIN_COVERED, Coverage, add_coverage, classes_of
from limbeck.tokenizers.hub import hub_answers
from limbeck.tokenizers.identity import template_hash, tokenizer_hash
from limbeck.tokenizers.load import backend_of, load_tokenizer, plain_backend
from limbeck.tokenizers.outcomes import Outcomes, shared_outcomes
from limbeck.tokenizers.token_bytes import TokenBytes
from limbeck.tokenizers.vocabulary import (
    VocabularyProof,
    prove_same_vocabulary,
    refuse_differing_ids,
    tokens_by_id,
)

__all__ = [
    "MIN_COVERED",
    "Aligner",
    "Alignment",
    "Coverage",
    "Outcomes",
    "Rendering",
    "TokenBytes",
    "VocabularyProof",
    "add_coverage",
    "align_conversation",
    "backend_of",
    "classes_of",
    "hub_answers",
    "load_tokenizer",
    "part_of",
    "plain_backend",
    "prove_same_vocabulary",
    "refuse_differing_ids",
    "shared_outcomes",
    "template_hash",
    "tokenizer_hash",
    "tokens_by_id",
]
