"""Which of a teacher's layers matter: measured, not guessed.

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

from limbeck.batch import Batch
from limbeck.models import CausalLM
from limbeck.prune.calibration import Calibration, Cost, costs

Progress = Callable[[str], None]
"""Told what has been found."""


def block_influence(calibration: Calibration) -> list[float]:
    """1 - cosine of each block's input and output, a mean over the scored tokens.

    Source: Men et al., 2024, arXiv:2403.03853, eq. 1.
    """
    teacher, sums = calibration.teacher, [0.0] * calibration.teacher.num_layers

    def weigh(at: int, batch: Batch) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = first_tensor(args, kwargs)[batch.scored].double()
            after = tensor_of(output)[batch.scored].double()
            sums[at] += float((1 - nn.functional.cosine_similarity(before, after, dim=-1)).sum())

        return hook

    with torch.no_grad():
        for batch in calibration.batches:
            with ExitStack() as stack:
                for at, block in enumerate(teacher.blocks):
                    handle = block.register_forward_hook(weigh(at, batch), with_kwargs=True)
                    stack.callback(handle.remove)
                teacher(batch)
    return [total / calibration.num_tokens for total in sums]


def loss_without(
    calibration: Calibration, candidates: Sequence[tuple[int, ...]], gone: Sequence[int] = ()
) -> list[float]:
    """Forward KL of `costs_without`."""
    return [cost.forward_kl for cost in costs_without(calibration, candidates, gone)]


def costs_without(
    calibration: Calibration, candidates: Sequence[tuple[int, ...]], gone: Sequence[int] = ()
) -> list[Cost]:
    """What the teacher costs without each of some groups of blocks.

    What comes before a group is computed once for all of them.

    Args:
        calibration: The teacher and the text.
        candidates: Groups of blocks, each left out in turn.
        gone: Blocks left out in every case.
    """
    teacher, totals = calibration.teacher, torch.zeros(len(candidates), 2, dtype=torch.float64)
    with torch.no_grad():
        for batch, wanted in zip(calibration.batches, calibration.states, strict=True):
            with without(teacher, gone), inputs_kept(teacher) as inputs:
                teacher(batch)
            states = []
            for group in candidates:
                with resumed(teacher, (*group, *gone), min(group), inputs):
                    states.append(teacher(batch)[0])
            totals += costs(teacher, states, (teacher, wanted), batch)
    return [Cost(*row) for row in (totals / calibration.num_tokens).tolist()]


def greedy(
    calibration: Calibration,
    keep: int,
    progress: Progress = lambda _: None,
    known: Sequence[Mapping[str, Any]] = (),
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """Layers left when the one whose absence costs least is taken out, again and again.

    Args:
        calibration: The teacher and the text.
        keep: Layers that stay.
        progress: Told of every removal.
        known: Removals of an earlier call on the same calibration, to go on from.

    Returns:
        The layers that stay; and of each removal the layer, and the forward KL after it.
    """
    total = calibration.teacher.num_layers
    removals = [dict(removal) for removal in known[: total - keep]]
    kept = [i for i in range(total) if i not in {removal["layer"] for removal in removals}]
    while len(kept) > keep:
        gone = [removal["layer"] for removal in removals]
        found = loss_without(calibration, [(layer,) for layer in kept], gone)
        best = min(range(len(kept)), key=found.__getitem__)
        removals.append({"layer": kept.pop(best), "forward_kl": round(found[best], 5)})
        progress(f"{len(kept)} layers: KL {found[best]:.3f} without layer {removals[-1]['layer']}")
    return tuple(kept), removals


def cheapest_span(calibration: Calibration, keep: int) -> tuple[tuple[int, ...], float]:
    """Layers left without the stretch of neighbours that costs least, and its forward KL.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024,
    arXiv:2403.17887, removes one stretch; here it is chosen by the loss.
    """
    total = calibration.teacher.num_layers
    length = total - keep
    if not length:
        return tuple(range(total)), 0.0
    spans = [tuple(range(start, start + length)) for start in range(total - length + 1)]
    found = loss_without(calibration, spans)
    best = min(range(len(spans)), key=found.__getitem__)
    return tuple(i for i in range(total) if i not in spans[best]), found[best]


@contextmanager
def without(model: CausalLM, layers: Sequence[int]) -> Iterator[None]:
    """The model with some blocks passing on what they are given."""
    with replaced(model, dict.fromkeys(layers, passes_on)):
        yield


@contextmanager
def resumed(
    model: CausalLM, layers: Sequence[int], at: int, inputs: Mapping[int, Tensor]
) -> Iterator[None]:
    """As `without`, going on from a block's input; nothing before it is computed."""

    def starts(_hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return inputs[at]

    changed = dict.fromkeys((*range(at), *layers), passes_on)
    with replaced(model, {**changed, at: starts}):
        yield


@contextmanager
def replaced(model: CausalLM, forwards: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
    """The model with other functions in the place of some blocks."""
    blocks = {layer: model.blocks[layer] for layer in forwards}
    try:
        for layer, block in blocks.items():
            vars(block)["forward"] = forwards[layer]
        yield
    finally:
        for block in blocks.values():
            vars(block).pop("forward", None)


@contextmanager
def inputs_kept(model: CausalLM) -> Iterator[dict[int, Tensor]]:
    """What each block is given, by layer."""
    inputs: dict[int, Tensor] = {}

    def keep(at: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[at] = first_tensor(args, kwargs)

        return hook

    with ExitStack() as stack:
        for at, block in enumerate(model.blocks):
            stack.callback(block.register_forward_pre_hook(keep(at), with_kwargs=True).remove)
        yield inputs


def passes_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """A block that is not there."""
    return hidden_states


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """A block's hidden states among what it is called with."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def tensor_of(output: Any) -> Tensor:
    """A block's hidden states in what it returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
