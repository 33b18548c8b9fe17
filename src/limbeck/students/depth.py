"""A student with some of its teacher's layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import (
    CausalLM,
    ModelSource,
    PreTrainedTokenizerBase,
    load_model,
    model_facts,
    shape_facts,
)
from limbeck.prune import cut_config
from limbeck.prune.calibration import Calibration, CalibrationText, calibrate
from limbeck.prune.importance import block_influence, cheapest_span, greedy
from limbeck.prune.targets import count_of, layers_for
from limbeck.students.base import InitialStudent, Origin, initialisers, made_of
from limbeck.tokenizers import load_tokenizer

Layers = tuple[Annotated[int, Ge(0)], ...] | None
By = Literal["even", "block_influence", "span", "loss"]
"""How layers are chosen: evenly spaced; those with the largest block influence; all but the run of
consecutive layers whose removal costs least; or greedily, removing the layer that costs least.
"""
DEFAULT_BY: By = "block_influence"
"""One pass over the calibration text, and far better than even spacing (docs/students.md)."""

CALIBRATION_TOKENS = 2048
"""Positions of calibration text; SmolLM2's greedy choice was made on as many (LOG.md)."""


@initialisers.register("depth")
def depth(
    origin: Origin,
    *,
    layers: Layers = None,
    keep: Annotated[int, Gt(0)] | None = None,
    fraction: Annotated[float, Gt(0), Le(1)] | None = None,
    params: int | str | None = None,
    drop: Layers = None,
    by: By | None = None,
    calibration_tokens: Annotated[int, Gt(0)] = CALIBRATION_TOKENS,
    path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> InitialStudent:
    """Some of the teacher's layers, its embeddings and its head, copied.

    Exactly one of `layers`, `drop`, `keep`, `fraction` and `params` says how many or which.

    Args:
        layers: 0-based teacher layers that are kept, in order.
        keep: Number of layers kept.
        fraction: Share of the layers kept.
        params: Keep as many layers as fit in this number of parameters, e.g. `60M`.
        drop: 0-based teacher layers that are removed.
        by: How layers are chosen: `even` spaces them evenly; `block_influence`, the default, keeps
            those that change their input most; `span` removes the run of consecutive layers
            that costs least; `loss` removes one layer after the other, each time the one whose
            removal raises KL to the teacher least.
        calibration_tokens: Positions of the training text on which importance is measured.
        path: Model to prune in place of the teacher, needed where the teacher has no weights here.
        revision: Commit, tag or branch of a model on the Hub.
        trust_remote_code: Run Python code that comes with the model.
    """
    ways = {"layers": layers, "keep": keep, "fraction": fraction, "params": params, "drop": drop}
    if problem := ways_problem(by=by, **ways):
        raise ConfigError(problem)
    teacher, tokenizer, facts = teacher_of(
        origin, None if path is None else (path, revision, trust_remote_code)
    )
    if fraction is not None:
        keep = max(round(fraction * teacher.num_layers), 1)
    if params is not None:
        keep = layers_for(teacher.config, count_of(params))
    by = by or DEFAULT_BY
    if keep is not None and by != "even":
        calibration = calibrate(teacher, calibration_text(origin), calibration_tokens)
        layers, chosen = choose_layers(calibration, keep, by)
        facts |= {"chosen": chosen}
        keep = None
    kept = kept_layers(teacher.num_layers, layers=layers, keep=keep, drop=drop)
    model = cut(teacher, kept, origin)
    facts = {"origin": "depth", "layers_kept": list(kept), **shape_facts(model), **facts}
    return InitialStudent(model, tokenizer, LayerMap.surviving(kept), facts)


def teacher_of(
    origin: Origin, place: tuple[str, str | None, bool] | None
) -> tuple[CausalLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """The model a student is pruned from, its tokenizer, and facts if it is not the teacher."""
    if place is None:
        remedy = "Set student.path to the teacher's folder or name."
        return origin.require_teacher("A pruned student", remedy), origin.tokenizer, {}
    source = ModelSource(*place)
    # On the CPU: the device holds teacher and student already.
    teacher = load_model(source, device=torch.device("cpu"), dtype=origin.dtype)
    path, revision, trust_remote_code = place
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    return (
        teacher,
        tokenizer,
        {"cut_from": model_facts(source, teacher, hashed=origin.world.is_main)},
    )


def ways_problem(*, by: str | None, **ways: Any) -> str | None:
    """What is wrong with the options that choose the layers; None if nothing is."""
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        return (
            "a depth student needs exactly one of layers (those kept), drop (those removed), keep "
            "(number of layers), fraction (share of the layers) and params (at most so many "
            f"parameters, as 60M), got {', '.join(given) or 'none'}."
        )
    if by is not None and given[0] in ("layers", "drop"):
        return (
            f"by says how layers are chosen, and {given[0]} names them already, got by: {by}. "
            "Leave out one of them, or give keep."
        )
    return None


def calibration_text(origin: Origin) -> CalibrationText:
    """The calibration text."""
    if origin.text is None:
        raise ConfigError(
            "Importance is measured on text, and there is none here. Choose by: even, or give an "
            "Origin with text."
        )
    return origin.text()


def choose_layers(
    calibration: Calibration, keep: int, by: By
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers of a teacher that are kept, and how they were chosen.

    Raises:
        ConfigError: It has fewer layers.
    """
    total = calibration.teacher.num_layers
    even = even_layers(keep, total)
    found: dict[str, Any] = {"by": by, "calibration_tokens": calibration.num_tokens}
    if by == "loss":
        kept, removals = greedy(calibration, keep)
        return kept, found | {"removals": removals}
    if by == "span":
        kept, kl = cheapest_span(calibration, keep)
        return kept, found | {"forward_kl": round(kl, 5)}
    if by == "block_influence":
        influence = block_influence(calibration)
        ranked = sorted(range(total), key=influence.__getitem__, reverse=True)
        return tuple(sorted(ranked[:keep])), found | {
            "block_influence": [round(value, 5) for value in influence]
        }
    return even, found


def kept_layers(
    num_layers: int, *, layers: Sequence[int] | None, keep: int | None, drop: Sequence[int] | None
) -> tuple[int, ...]:
    """The layers a student keeps, 0-based and increasing; exactly one of the three is given."""
    if keep is not None:
        return even_layers(keep, num_layers)
    option, named = ("layers", layers) if layers is not None else ("drop", drop or ())
    rule = (
        f"{option} must name layers of the teacher, 0 to {num_layers - 1}, each once and in order"
    )
    if absent := [i for i in named if not 0 <= i < num_layers]:
        raise ConfigError(f"{rule}, but it has no {absent} (got {list(named)}). Leave them out.")
    if twice := sorted({i for i in named if list(named).count(i) > 1}):
        raise ConfigError(f"{rule}; {twice[0]} is listed twice (got {list(named)}).")
    if list(named) != sorted(named):
        raise ConfigError(f"{rule}, got {list(named)}. Sort them: {sorted(named)}.")
    kept = tuple(named) if option == "layers" else tuple(sorted(set(range(num_layers)) - {*named}))
    if not kept:
        raise ConfigError(f"A student must keep at least one layer, but {option} leaves none.")
    return kept


def even_layers(keep: int, num_layers: int) -> tuple[int, ...]:
    """Evenly spaced layers, the first and the last included.

    Example:
        >>> even_layers(4, 10)
        (0, 3, 6, 9)
    """
    if not 1 <= keep <= num_layers:
        raise ConfigError(
            f"A student keeps between 1 and the teacher's {num_layers} layers, got {keep}. Ask for "
            "fewer."
        )
    if keep == 1:  # the first layer, which reads the embedding
        return (0,)
    return tuple(teacher for _, teacher in LayerMap.uniform(keep, num_layers).pairs)


def cut(teacher: CausalLM, kept: Sequence[int], origin: Origin) -> CausalLM:
    """A copy of the teacher with the kept blocks only."""
    names = renumbered(teacher.hf_model.state_dict(), teacher.blocks_name, kept)
    return made_of(teacher, cut_config(teacher.config, kept), dict(names), origin)


def renumbered(
    names: Iterable[str], blocks_name: str, kept: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """New and old names of the kept blocks' weights, and of all other weights."""
    new_number = {str(old): new for new, old in enumerate(kept)}
    for name in names:
        if not name.startswith(f"{blocks_name}."):
            yield name, name
            continue
        number, _, rest = name.removeprefix(f"{blocks_name}.").partition(".")
        if number in new_number:
            yield f"{blocks_name}.{new_number[number]}.{rest}", name
