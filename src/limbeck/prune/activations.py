"""Importance of hidden channels, heads and feed-forward units, by the size of their activations.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), 2024, arXiv:2407.14679, section 2.2: activations on a little calibration text, forward
passes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.batch import Batch
from limbeck.models import CausalLM, evaluating
from limbeck.models.modes import tensor_of
from limbeck.prune.layouts import Widths, widths_of
from limbeck.prune.narrow import Kept
from limbeck.prune.roles import roles_of


@dataclass(frozen=True)
class Activations:
    """Mean activation sizes over the scored tokens, float64 on the CPU.

    Attributes:
        width: |output| of the blocks' norms, averaged over norms and layers.
        inner: |input| of each block's last feed-forward projection.
        heads: Euclidean length of each head's output, before the projection that mixes them.
    """

    width: Float[Tensor, " D"]
    inner: Float[Tensor, "L I"]
    heads: Float[Tensor, "L H"]


def mean_activations(model: CausalLM, batches: Sequence[Batch]) -> Activations:
    """Mean activation sizes of a model on calibration text."""
    roles, widths, layers = roles_of(model.config), widths_of(model.config), model.num_layers
    sums = Activations(
        torch.zeros(widths.width, dtype=torch.float64),
        torch.zeros(layers, widths.inner, dtype=torch.float64),
        torch.zeros(layers, widths.heads, dtype=torch.float64),
    )
    tokens = 0

    def accumulate(
        total: Tensor, size: Callable[[Tensor], Tensor], scored: Tensor
    ) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, *output: Any) -> None:
            values = tensor_of(output[0]) if output else args[0]
            total.add_(size(values.detach()[scored]).double().sum(0).cpu())

        return hook

    def length(values: Tensor) -> Tensor:
        lengths: Tensor = values.reshape(len(values), widths.heads, -1).norm(dim=-1)
        return lengths

    with torch.no_grad(), evaluating(model):
        for batch in batches:
            tokens += int(batch.scored.sum())
            with ExitStack() as stack:
                for at, block in enumerate(model.blocks):
                    for name, total, size in (
                        (roles.inner_out, sums.inner[at], torch.abs),
                        (roles.heads_out, sums.heads[at], length),
                    ):
                        hook = accumulate(total, size, batch.scored)
                        handle = block.get_submodule(name).register_forward_pre_hook(hook)
                        stack.callback(handle.remove)
                    for name in roles.norms:
                        hook = accumulate(sums.width, torch.abs, batch.scored)
                        norm = block.get_submodule(name)
                        stack.callback(norm.register_forward_hook(hook).remove)
                model(batch)
    norms = len(roles.norms) * layers
    return Activations(sums.width / tokens / norms, sums.inner / tokens, sums.heads / tokens)


def largest(sizes: Activations, old: Widths, new: Widths) -> Kept:
    """The channels, units and heads with the largest activations.

    Query heads are removed in whole groups, together with their key and value head; a group's size
    is the sum over its heads. Within the remaining groups the largest heads are kept.
    """
    layers = range(len(sizes.inner))
    group, fewer = old.heads // old.kv_heads, new.heads // new.kv_heads
    groups = sizes.heads.view(-1, old.kv_heads, group)
    kv_heads = tuple(top(groups[at].sum(-1), new.kv_heads) for at in layers)
    heads = tuple(
        tuple(kv * group + head for kv in kv_heads[at] for head in top(groups[at, kv], fewer))
        for at in layers
    )
    inner = tuple(top(sizes.inner[at], new.inner) for at in layers)
    return Kept(top(sizes.width, new.width), inner, heads, kv_heads)


def top(sizes: Float[Tensor, " n"], count: int) -> tuple[int, ...]:
    """Sorted indices of the `count` largest values; ties keep the first.

    Example:
        >>> top(torch.tensor([3.0, 1.0, 3.0, 5.0]), 2)
        (0, 3)
    """
    ranked = torch.sort(sizes, descending=True, stable=True).indices
    return tuple(sorted(ranked[:count].tolist()))
