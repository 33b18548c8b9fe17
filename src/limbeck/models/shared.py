"""Two models with one copy of their weights."""

from __future__ import annotations

import copy

from limbeck.models.causal_lm import CausalLM


def shared_model(model: CausalLM) -> CausalLM:
    """A model with its own modules that shares the weights and buffers of another, in eval mode.

    Adapters added to one do not affect the other; a change of a weight changes both.
    """
    tensors = [*model.hf_model.parameters(), *model.hf_model.buffers()]
    # deepcopy takes what stands in its memo for copied already.
    made = CausalLM(copy.deepcopy(model.hf_model, {id(tensor): tensor for tensor in tensors}))
    made.vocabulary_size = model.vocabulary_size
    return made.eval()
