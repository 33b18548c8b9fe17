"""Measured importance of a teacher's layers.

Sources: block influence, Men et al., "ShortGPT", 2024, arXiv:2403.03853; loss increase and its
comparison with influence, Muralidharan et al., "Compact Language Models via Pruning and Knowledge
Distillation" (Minitron), 2024, arXiv:2407.14679.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from limbeck.heap import freed_memory_kept
from limbeck.models import CausalLM
from limbeck.models.modes import tensor_of
from limbeck.prune.calibration import Calibration, Cost, costs

SHORTLIST = 1 / 3
"""Part of the remaining layers whose removal is measured at every step of `greedy`."""

SHORTEST_LIST = 10
"""Layers that are measured at least."""


def block_influence(calibration: Calibration) -> list[float]:
    """1 - cosine of each block's input and output, averaged over the scored tokens.

    Source: Men et al., 2024, arXiv:2403.03853, eq. 1.
    """
    teacher, sums = calibration.teacher, [0.0] * calibration.teacher.num_layers
    with torch.no_grad():
        for batch in calibration.batches:
            with states_kept(teacher) as states:
                teacher(batch)
            for at, pair in states.items():
                before, after = (batch.scored_rows(state).double() for state in pair)
                sums[at] += float((1 - cosine_similarity(before, after, dim=-1)).sum())
    return [total / calibration.num_tokens for total in sums]


def update_sizes(calibration: Calibration, removed: Sequence[int] = ()) -> dict[int, float]:
    """Mean norm of what each remaining block adds to its input, relative to the input's norm.

    Measured on the first quarter of the rows: it only orders the layers.
    """
    teacher, sums = calibration.teacher, dict[int, float]()
    rows = calibration.batches[: max(1, len(calibration.batches) // 4)]
    with torch.no_grad():
        for batch in rows:
            with without(teacher, removed), states_kept(teacher) as states:
                teacher(batch)
            for at, pair in states.items():
                before, after = (batch.scored_rows(state).double() for state in pair)
                sizes = (after - before).norm(dim=-1) / before.norm(dim=-1)
                sums[at] = sums.get(at, 0.0) + float(sizes.sum())
    count = sum(int(batch.num_scored()) for batch in rows)
    return {at: total / count for at, total in sums.items() if at not in removed}


def loss_without(
    calibration: Calibration, candidates: Sequence[tuple[int, ...]], removed: Sequence[int] = ()
) -> list[float]:
    """Forward KL of `costs_without`."""
    return [cost.forward_kl for cost in costs_without(calibration, candidates, removed)]


def costs_without(
    calibration: Calibration, candidates: Sequence[tuple[int, ...]], removed: Sequence[int] = ()
) -> list[Cost]:
    """Losses of the teacher without each group of blocks.

    The blocks before a group are computed once and shared by all candidates.
    """
    teacher, totals = calibration.teacher, torch.zeros(len(candidates), 2, dtype=torch.float64)
    with torch.no_grad(), freed_memory_kept(teacher.device):
        for batch, hidden in zip(calibration.batches, calibration.states, strict=True):
            with without(teacher, removed), states_kept(teacher) as kept:
                teacher(batch)
            inputs = {layer: before for layer, (before, _) in kept.items()}
            states = []
            for group in candidates:
                with resumed(teacher, (*group, *removed), min(group), inputs):
                    states.append(teacher(batch)[0])
            totals += costs(teacher, states, (teacher, hidden), batch)
    return [Cost(*row) for row in (totals / calibration.num_tokens).tolist()]


def greedy(
    calibration: Calibration,
    keep: int,
    known: Sequence[Mapping[str, Any]] = (),
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """Layers kept by repeatedly removing the layer whose absence raises the loss least.

    Each time only the layers with the smallest `update_sizes` are measured, a third of those left.

    Args:
        known: Removals of an earlier call on the same calibration, to resume from.

    Returns:
        The kept layers; and for each removal its layer and the forward KL after it.
    """
    total = calibration.teacher.num_layers
    removals = [dict(removal) for removal in known[: total - keep]]
    kept = [i for i in range(total) if i not in {removal["layer"] for removal in removals}]
    while len(kept) > keep:
        removed = [removal["layer"] for removal in removals]
        sizes = update_sizes(calibration, removed)
        num_measured = max(SHORTEST_LIST, round(SHORTLIST * len(kept)))
        shortlist = sorted(sorted(kept, key=sizes.__getitem__)[:num_measured])
        losses = loss_without(calibration, [(layer,) for layer in shortlist], removed)
        best, layer = min(zip(losses, shortlist, strict=True))
        kept.remove(layer)
        removals.append({"layer": layer, "forward_kl": round(best, 5)})
    return tuple(kept), removals


def cheapest_span(calibration: Calibration, keep: int) -> tuple[tuple[int, ...], float]:
    """Layers kept by removing the cheapest run of consecutive layers, and the forward KL then.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024,
    arXiv:2403.17887, removes one run of layers; here it is chosen by the loss.
    """
    total = calibration.teacher.num_layers
    length = total - keep
    if not length:
        return tuple(range(total)), 0.0
    spans = [tuple(range(start, start + length)) for start in range(total - length + 1)]
    losses = loss_without(calibration, spans)
    best = min(range(len(spans)), key=losses.__getitem__)
    return tuple(i for i in range(total) if i not in spans[best]), losses[best]


@contextmanager
def without(model: CausalLM, layers: Sequence[int]) -> Iterator[None]:
    """The model with the given blocks replaced by the identity."""
    with replaced(model, dict.fromkeys(layers, identity)):
        yield


@contextmanager
def resumed(
    model: CausalLM, layers: Sequence[int], at: int, inputs: Mapping[int, Tensor]
) -> Iterator[None]:
    """As `without`, resuming from block `at`'s stored input; earlier blocks are skipped."""

    def resume(_hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return inputs[at]

    changed = dict.fromkeys((*range(at), *layers), identity)
    with replaced(model, {**changed, at: resume}):
        yield


@contextmanager
def replaced(model: CausalLM, forwards: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
    """The model with the forward functions of the given blocks replaced."""
    blocks = {layer: model.blocks[layer] for layer in forwards}
    try:
        for layer, block in blocks.items():
            vars(block)["forward"] = forwards[layer]
        yield
    finally:
        for block in blocks.values():
            vars(block).pop("forward", None)


@contextmanager
def states_kept(model: CausalLM) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Each block's input and output hidden states, by layer, of a forward pass in the context."""
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(at: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before: Tensor = args[0] if args else kwargs["hidden_states"]
            states[at] = before, tensor_of(output)

        return hook

    with ExitStack() as stack:
        for at, block in enumerate(model.blocks):
            stack.callback(block.register_forward_hook(keep(at), with_kwargs=True).remove)
        yield states


def identity(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """Stand-in for a removed block."""
    return hidden_states
