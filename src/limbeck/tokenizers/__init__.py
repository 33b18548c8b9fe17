"""Tokenizers: loading, identity by hash, and the proof that two vocabularies are the same."""

from limbeck.tokenizers.hub import hub_answers
from limbeck.tokenizers.identity import template_difference, template_hash, tokenizer_hash
from limbeck.tokenizers.load import backend_of, load_tokenizer
from limbeck.tokenizers.vocabulary import (
    VocabularyProof,
    prove_same_vocabulary,
    refuse_differing_ids,
    tokens_by_id,
)

__all__ = [
    "VocabularyProof",
    "backend_of",
    "hub_answers",
    "load_tokenizer",
    "prove_same_vocabulary",
    "refuse_differing_ids",
    "template_difference",
    "template_hash",
    "tokenizer_hash",
    "tokens_by_id",
]
