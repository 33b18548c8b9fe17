"""Which hidden channels, heads and feed-forward units of a model matter: how large they are.

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
from limbeck.prune.importance import tensor_of
from limbeck.prune.narrow import Kept, Widths, widths_of
from limbeck.prune.roles import roles_of


@dataclass(frozen=True)
class Activations:
    """Mean sizes over the scored tokens, float64 on the CPU.

    Attributes:
        width: |output| of the blocks' norms, a mean over norms and layers too.
        inner: |input| of each block's last feed-forward projection.
        heads: Euclidean length of each head's output, before the projection that mixes them.
    """

    width: Float[Tensor, " D"]
    inner: Float[Tensor, "L I"]
    heads: Float[Tensor, "L H"]


def weigh(model: CausalLM, batches: Sequence[Batch]) -> Activations:
    """How large every part of a model is on some text.

    Raises:
        ConfigError: There is no entry for the family.
    """
    roles, widths, layers = roles_of(model.config), widths_of(model.config), model.num_layers
    sums = Activations(
        torch.zeros(widths.width, dtype=torch.float64),
        torch.zeros(layers, widths.inner, dtype=torch.float64),
        torch.zeros(layers, widths.heads, dtype=torch.float64),
    )
    tokens = 0

    def adds(
        total: Tensor, size: Callable[[Tensor], Tensor], scored: Tensor
    ) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, *output: Any) -> None:
            seen = tensor_of(output[0]) if output else args[0]
            total.add_(size(seen.detach()[scored]).double().sum(0).cpu())

        return hook

    def length(seen: Tensor) -> Tensor:
        lengths: Tensor = seen.reshape(len(seen), widths.heads, -1).norm(dim=-1)
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
                        hook = adds(total, size, batch.scored)
                        handle = block.get_submodule(name).register_forward_pre_hook(hook)
                        stack.callback(handle.remove)
                    for name in roles.norms:
                        hook = adds(sums.width, torch.abs, batch.scored)
                        norm = block.get_submodule(name)
                        stack.callback(norm.register_forward_hook(hook).remove)
                model(batch)
    norms = len(roles.norms) * layers
    return Activations(sums.width / tokens / norms, sums.inner / tokens, sums.heads / tokens)


def largest(found: Activations, old: Widths, new: Widths) -> Kept:
    """The largest parts, so many of each.

    Whole groups of query heads go with their key and value head, the group's size being the sum of
    its heads'; within the groups that stay, the largest heads do.
    """
    layers = range(len(found.inner))
    group, fewer = old.heads // old.kv_heads, new.heads // new.kv_heads
    groups = found.heads.view(-1, old.kv_heads, group)
    kv_heads = tuple(top(groups[at].sum(-1), new.kv_heads) for at in layers)
    heads = tuple(
        tuple(kv * group + head for kv in kv_heads[at] for head in top(groups[at, kv], fewer))
        for at in layers
    )
    inner = tuple(top(found.inner[at], new.inner) for at in layers)
    return Kept(top(found.width, new.width), inner, heads, kv_heads)


def top(sizes: Float[Tensor, " n"], count: int) -> tuple[int, ...]:
    """Places of the largest numbers, in order; of equal ones the first.

    Example:
        >>> top(torch.tensor([3.0, 1.0, 3.0, 5.0]), 2)
        (0, 3)
    """
    ranked = torch.sort(sizes, descending=True, stable=True).indices
    return tuple(sorted(ranked[:count].tolist()))
