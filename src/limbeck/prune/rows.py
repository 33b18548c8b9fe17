"""Vocabulary pruning: keeps the rows of a subset of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from limbeck.errors import ConfigError
from limbeck.models.build import hollow
from limbeck.models.causal_lm import CausalLM
from limbeck.models.load import copied_model
from limbeck.models.modes import evaluating
from limbeck.models.prove import HEAD_TOLERANCE
from limbeck.prune.layouts import made_config, own_name

LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Generation settings that are lists of independent ids."""

REFUSED = ("force_words_ids", "sequence_bias", "forced_decoder_ids")
"""Generation settings that force tokens and cannot be remapped."""


def named_ids(model: CausalLM) -> frozenset[int]:
    """BOS, EOS, padding and other ids in a model's configuration and generation settings."""
    trees = (model.config.to_dict(), generation_tree(model))
    values = [v for tree in trees for name, v in tree.items() if name.endswith("token_id")]
    listed = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return frozenset(i for i in listed if isinstance(i, int))


def with_tokens(model: CausalLM, kept: Sequence[int]) -> CausalLM:
    """A new model with the kept tokens only; a token's index in `kept` is its new id.

    The blocks are unchanged and the logits equal the original's at the kept ids, so the
    distribution is the original's, restricted to them and renormalised.

    Args:
        kept: Ids in increasing order.
    """
    new_id = {old: new for new, old in enumerate(kept)}
    tree = with_new_ids(model.config.to_dict(), new_id)
    tree[own_name(model.config, "vocab_size")] = len(kept)
    config = made_config(model.config, tree)
    shapes = {n: t.shape for n, t in hollow(config, torch.float32).state_dict().items()}
    weights = dict(cut_rows(model, kept, shapes))
    hf_model = model.hf_model
    made = copied_model(config, weights, device=hf_model.device, dtype=hf_model.dtype)
    made.hf_model.generation_config = remapped_generation(model, new_id)
    return made


def cut_rows(
    model: CausalLM, kept: Sequence[int], shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Every weight: unchanged, or its kept rows where the pruned shape requires it."""
    state = model.hf_model.state_dict()
    chosen = torch.tensor(kept, device=model.hf_model.device)
    for name, tensor in state.items():
        new_shape = shapes.get(name)
        if new_shape == tensor.shape:
            yield name, tensor
            continue
        rows = torch.Size([len(kept), *tensor.shape[1:]])
        if new_shape != rows or len(tensor) < model.vocabulary_size:
            raise ConfigError(
                "A vocabulary can be pruned if its weights have one row per token, but "
                f"{name} of this {model.family} model is {tuple(tensor.shape)} with "
                f"{model.vocabulary_size:,} tokens and would be {new_shape and tuple(new_shape)} "
                f"with {len(kept):,}. Do not prune its vocabulary."
            )
        yield name, tensor.index_select(0, chosen)


def with_new_ids(tree: Mapping[str, Any], new_id: Mapping[int, int]) -> dict[str, Any]:
    """Settings with remapped ids; ids of removed tokens become None.

    Example:
        >>> with_new_ids({"pad_token_id": -1, "eos_token_id": [7, 9, 8], "width": 9}, {7: 0, 9: 1})
        {'pad_token_id': None, 'eos_token_id': [0, 1], 'width': 9}
    """
    changed = dict(tree)
    for name, value in tree.items():
        if not name.endswith("token_id") or value is None:
            continue
        if isinstance(value, list):
            changed[name] = [new_id[i] for i in value if i in new_id]
        else:
            changed[name] = new_id.get(value)
    return changed


def generation_tree(model: CausalLM) -> dict[str, Any]:
    """A model's generation settings."""
    settings = model.hf_model.generation_config
    tree: dict[str, Any] = {} if settings is None else settings.to_dict()
    return tree


def remapped_generation(model: CausalLM, new_id: Mapping[int, int]) -> GenerationConfig:
    """Generation settings with remapped ids; bans on removed tokens are dropped."""
    old = generation_tree(model)
    if forcing := [name for name in REFUSED if old.get(name) is not None]:
        raise ConfigError(
            f"Generation settings must not force tokens when a vocabulary is pruned, "
            f"but those of this {model.family} model have {', '.join(forcing)}. Remove it from "
            "generation_config.json."
        )
    tree = with_new_ids(old, new_id)
    for name in LISTS:
        if tree.get(name) is not None:
            tree[name] = [new_id[i] for i in tree[name] if i in new_id] or None
    if tree.get("bad_words_ids") is not None:
        words = [word for word in tree["bad_words_ids"] if new_id.keys() >= {*word}]
        tree["bad_words_ids"] = [[new_id[i] for i in word] for word in words] or None
    return GenerationConfig.from_dict(tree)


def prove_same_logits(
    whole: CausalLM, pruned: CausalLM, kept: Sequence[int], input_ids: Int[Tensor, "B T"]
) -> None:
    """Check on text that a pruned model's logits equal the whole model's at the kept tokens.

    Args:
        kept: Whole-model ids of the pruned model's tokens.
        input_ids: Text, in the pruned model's ids.
    """
    chosen = torch.tensor(kept, device=input_ids.device)
    with torch.no_grad(), evaluating(whole), evaluating(pruned):
        expected = whole.logits(chosen[input_ids])[..., chosen].float()
        gap = (pruned.logits(input_ids).float() - expected).abs().max() / expected.abs().max()
    bound = HEAD_TOLERANCE[whole.hf_model.dtype]
    if not gap <= bound:
        raise ConfigError(
            "A pruned vocabulary must not change the logits of the kept tokens, but those of "
            f"this {whole.family} model differ by up to {float(gap):.3g} of the largest (allowed: "
            f"{bound:.3g}). It uses token ids for more than embedding look-ups: do not prune its "
            "vocabulary."
        )
