"""A student with random weights."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt

from limbeck.errors import ConfigError
from limbeck.files import expanded
from limbeck.models import (
    PreTrainedConfig,
    new_model,
    prove_documents_apart,
    prove_head,
    shape_facts,
)
from limbeck.prune import Shape, read_pattern, resized_config
from limbeck.students.base import InitialStudent, Origin, initialisers, uniform_map

Size = Annotated[int, Gt(0)] | None
ROWS_MULTIPLE = 64
"""Embedding and head rows are padded to a multiple of this, for faster matrix products."""


@initialisers.register("random")
def random(
    origin: Origin,
    *,
    layers: Size = None,
    width: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    intermediate: Size = None,
    config: str | None = None,
) -> InitialStudent:
    """A new model with random weights, of the teacher's family or of a config.json.

    Args:
        layers: Number of layers; needed without `config`.
        width: Hidden size (`hidden` of a `width` student); needed without `config`.
        heads: Query heads; by default as many as keep the teacher's head size.
        kv_heads: Key and value heads; by default in the teacher's ratio to the query heads.
        intermediate: Inner size of the feed-forward layers; by default in the teacher's ratio.
        config: A config.json in place of the sizes, of the teacher's family or another.
    """
    shape = Shape(layers, width, heads, kv_heads, intermediate)
    size = max(origin.tokenizer.get_vocab().values()) + 1
    rows = -(-size // ROWS_MULTIPLE) * ROWS_MULTIPLE
    pattern = _pattern(origin, shape, rows, config)
    model = new_model(pattern, device=origin.device, dtype=origin.dtype, seed=origin.seed)
    if config is None and origin.teacher is not None:
        model.end_like(origin.teacher)
    model.vocabulary_size = size
    prove_head(model)
    prove_documents_apart(model)
    facts = {"origin": "random", "seed": origin.seed, **shape_facts(model)}
    return InitialStudent(model, origin.tokenizer, uniform_map(model, origin), facts)


def _pattern(origin: Origin, shape: Shape, rows: int, config: str | None) -> PreTrainedConfig:
    if config is not None:
        if shape != Shape():
            raise ConfigError(
                f"A random student has its size from config ({config}) or from options, got both. "
                "Leave one out."
            )
        pattern = read_pattern(expanded(config))
        pattern.vocab_size = rows
        pattern.bos_token_id = origin.tokenizer.bos_token_id
        pattern.eos_token_id = origin.tokenizer.eos_token_id
        pattern.pad_token_id = origin.tokenizer.pad_token_id
        return pattern
    teacher = origin.require_teacher(
        "A random student", "Set student.config to a model's config.json."
    )
    if shape.layers is None or shape.width is None:
        raise ConfigError(
            f"A random student needs layers and width, or config, got {shape}. Set both."
        )
    return resized_config(teacher.config, shape, rows)
