"""Queries, keys and values of chosen layers, as a forward pass makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses import Projections
from limbeck.models.causal_lm import CausalLM
from limbeck.models.modes import hooked

APART = ("q_proj", "k_proj", "v_proj")
"""Names of the three linear layers in most families."""

Split = Callable[[CausalLM, Tensor], tuple[Tensor, Tensor, Tensor]]


def _thirds(_model: CausalLM, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = output.chunk(3, dim=-1)
    return query, key, value


def _head_by_head(model: CausalLM, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = output.reshape(len(output), int(model.config.num_attention_heads), 3, -1)
    query, key, value = (part.flatten(1) for part in heads.unbind(2))
    return query, key, value


def _grouped(model: CausalLM, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    size = output.shape[-1] // (heads + 2 * groups)
    sizes = [heads * size, groups * size, groups * size]
    query, key, value = torch.split(output, sizes, dim=-1)
    return query, key, value


TOGETHER: Mapping[str, tuple[str, Split]] = {
    "gpt2": ("c_attn", _thirds),
    "gpt_neox": ("query_key_value", _head_by_head),
    "phi3": ("qkv_proj", _grouped),
}
"""Families with one linear layer for all three: its name, and how its output is divided."""


@contextmanager
def captured_projections(
    model: CausalLM, batch: Batch, layers: Iterable[int]
) -> Iterator[dict[int, Projections]]:
    """Capture queries, keys and values of some layers, 0-based, in a forward pass.

    The dictionary is filled when the context ends, with the scored positions only.
    """
    found: dict[int, Projections] = {}
    outputs: dict[tuple[int, str], Tensor] = {}
    layers = sorted(layers)

    def keep(place: tuple[int, str]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: outputs.update({place: output})

    with hooked(
        (module, keep((layer, name)))
        for layer in layers
        for name, module in projecting(model, layer)
    ):
        yield found
    # Only now: what a hook computes inside a checkpointed block would not be computed again there.
    shape = batch.scored.shape
    rows = {at: batch.scored_rows(output.reshape(*shape, -1)) for at, output in outputs.items()}
    for layer in layers:
        if model.family in TOGETHER:
            name, split = TOGETHER[model.family]
            found[layer] = Projections(*split(model, rows[layer, name]))
        else:
            found[layer] = Projections(*(rows[layer, name] for name in APART))


def projecting(model: CausalLM, layer: int) -> list[tuple[str, nn.Module]]:
    """The modules of a block that make its queries, keys and values, by name."""
    wanted = (TOGETHER[model.family][0],) if model.family in TOGETHER else APART
    named = [(path.rpartition(".")[2], m) for path, m in model.blocks[layer].named_modules()]
    found = [(name, module) for name, module in named if name in wanted]
    if sorted(name for name, _ in found) != sorted(wanted):
        raise ConfigError(
            f"attention_relations needs the {', '.join(wanted)} of each block, and block {layer} "
            f"of this {model.family} model has {', '.join(n for n, _ in found) or 'none'} of them. "
            "Use a term on hidden states: hidden_state, relations or cka."
        )
    return found
