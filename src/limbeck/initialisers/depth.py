"""A student that is some of its teacher's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.initialisers import InitialStudent, Origin, initialisers
from limbeck.layers import LayerMap
from limbeck.models import (
    CausalLM,
    ModelSource,
    copied_model,
    cut_config,
    load_model,
    model_facts,
    shape_facts,
)
from limbeck.tokenizers import load_tokenizer

Layers = tuple[Annotated[int, Ge(0)], ...] | None


@initialisers.register("depth")
def depth(
    origin: Origin,
    *,
    layers: Layers = None,
    keep: Annotated[int, Gt(0)] | None = None,
    drop: Layers = None,
    path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> InitialStudent:
    """Some of the teacher's layers, its embeddings and its head, copied."""
    if [layers, keep, drop].count(None) != 2:
        raise ConfigError(
            "A depth student needs exactly one of layers (those kept), keep (how many, spread "
            f"evenly) and drop (those left out), got layers {layers}, keep {keep}, drop {drop}."
        )
    source = None if path is None else ModelSource(path, revision, trust_remote_code)
    teacher, tokenizer = origin.teacher, origin.tokenizer
    facts: dict[str, Any] = {}
    if source is not None:
        # Loaded where it is cut, so that it never stands beside teacher and student on the device.
        teacher = load_model(source, device=torch.device("cpu"), dtype=origin.dtype)
        facts = {"cut_from": model_facts(source, teacher)}
        tokenizer = load_tokenizer(
            source.path, revision=revision, trust_remote_code=trust_remote_code
        )
    if teacher is None:
        raise ConfigError(
            "A depth student is cut out of the teacher's model, and there is only a record of it. "
            "Give path: the teacher's folder or name."
        )
    kept = kept_layers(teacher.num_layers, layers=layers, keep=keep, drop=drop)
    model = cut(teacher, kept, origin)
    facts = {"origin": "depth", "layers_kept": list(kept), **shape_facts(model), **facts}
    return InitialStudent(model, tokenizer, LayerMap.surviving(kept), facts)


def kept_layers(
    num_layers: int, *, layers: Sequence[int] | None, keep: int | None, drop: Sequence[int] | None
) -> tuple[int, ...]:
    """The layers a student keeps, 0-based and increasing; exactly one of the three is given.

    Raises:
        ConfigError: A layer the teacher does not have, one twice, out of order, or none left.
    """
    if keep is not None:
        return even_layers(keep, num_layers)
    option, named = ("layers", layers) if layers is not None else ("drop", drop or ())
    told = (
        f"{option} must name layers of the teacher, 0 to {num_layers - 1}, each once and in order"
    )
    if absent := [i for i in named if not 0 <= i < num_layers]:
        raise ConfigError(f"{told}, but it has no {absent} (got {list(named)}). Leave them out.")
    if twice := sorted({i for i in named if list(named).count(i) > 1}):
        raise ConfigError(f"{told}, but {twice} stand in it twice (got {list(named)}).")
    if list(named) != sorted(named):
        raise ConfigError(f"{told}, got {list(named)}. Sort them: {sorted(named)}.")
    kept = tuple(named) if option == "layers" else tuple(sorted(set(range(num_layers)) - {*named}))
    if not kept:
        raise ConfigError(f"A student must keep at least one layer, but {option} leaves none.")
    return kept


def even_layers(keep: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly over all, the first and the last among them.

    Example:
        >>> even_layers(4, 10)
        (0, 3, 6, 9)

    Raises:
        ConfigError: There are not so many.
    """
    if not 1 <= keep <= num_layers:
        raise ConfigError(
            f"keep must be between 1 and the teacher's {num_layers} layers, got {keep}. Lower it."
        )
    return tuple(teacher for _, teacher in LayerMap.uniform(keep, num_layers).pairs)


def cut(teacher: CausalLM, kept: Sequence[int], origin: Origin) -> CausalLM:
    """A model of its own: copies of some of the teacher's blocks, and of all that is no block."""
    config = cut_config(teacher.config, kept)
    weights = dict(renumbered(teacher.hf_model.state_dict(), teacher.blocks_name, kept))
    model = copied_model(config, weights, device=origin.device, dtype=origin.dtype)
    model.end_like(teacher)
    model.vocabulary_size = teacher.vocabulary_size
    return model


def renumbered(
    state: Mapping[str, Tensor], blocks_name: str, kept: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the kept blocks under their new numbers, and those of no block as they are."""
    new_number = {str(old): new for new, old in enumerate(kept)}
    for name, tensor in state.items():
        if not name.startswith(f"{blocks_name}."):
            yield name, tensor
            continue
        number, _, rest = name.removeprefix(f"{blocks_name}.").partition(".")
        if number in new_number:
            yield f"{blocks_name}.{new_number[number]}.{rest}", tensor
