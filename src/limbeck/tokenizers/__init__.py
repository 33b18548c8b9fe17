"""Tokenizers: loading, naming by hash, trimming, and proving that two mean the same."""

from limbeck.tokenizers.hub import hub_answers
from limbeck.tokenizers.identity import template_difference, template_hash, tokenizer_hash
from limbeck.tokenizers.load import backend_of, load_tokenizer
from limbeck.tokenizers.trim import kept_tokens, trimmed_tokenizer
from limbeck.tokenizers.vocabulary import VocabularyProof, prove_same_vocabulary, tokens_by_id

__all__ = [
    "VocabularyProof",
    "backend_of",
    "hub_answers",
    "kept_tokens",
    "load_tokenizer",
    "prove_same_vocabulary",
    "template_difference",
    "template_hash",
    "tokenizer_hash",
    "tokens_by_id",
    "trimmed_tokenizer",
]
