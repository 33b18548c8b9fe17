"""Students cut from a teacher: depth, width, vocabulary, and what each part is worth."""

from limbeck.prune.layouts import (
    Shape,
    cut_config,
    read_pattern,
    resized_config,
)
from limbeck.prune.narrow import (
    Widths,
    narrowed,
    num_parameters,
    widths_of,
)
from limbeck.prune.rows import (
    named_ids,
    prove_same_logits,
    with_tokens,
)
from limbeck.prune.tokenizer import (
    kept_tokens,
    trimmed_tokenizer,
)

__all__ = [
    "Shape",
    "Widths",
    "cut_config",
    "kept_tokens",
    "named_ids",
    "narrowed",
    "num_parameters",
    "prove_same_logits",
    "read_pattern",
    "resized_config",
    "trimmed_tokenizer",
    "widths_of",
    "with_tokens",
]
