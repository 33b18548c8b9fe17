"""Pruning a teacher in depth, width and vocabulary; importance of its parts."""

from limbeck.prune.layouts import (
    Shape,
    Widths,
    cut_config,
    read_pattern,
    resized_config,
    widths_of,
)
from limbeck.prune.narrow import narrowed
from limbeck.prune.rows import named_ids, prove_same_logits, with_tokens
from limbeck.prune.tokenizer import kept_tokens, pruned_tokenizer

__all__ = [
    "Shape",
    "Widths",
    "cut_config",
    "kept_tokens",
    "named_ids",
    "narrowed",
    "prove_same_logits",
    "pruned_tokenizer",
    "read_pattern",
    "resized_config",
    "widths_of",
    "with_tokens",
]
