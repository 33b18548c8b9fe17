"""A student with some of its teacher's channels, heads, units and layers."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import shape_facts
from limbeck.prune import Widths, narrowed, widths_of
from limbeck.prune.activations import largest, mean_activations
from limbeck.prune.calibration import Calibration, calibrate
from limbeck.prune.targets import count_of, widths_for
from limbeck.students.base import InitialStudent, Origin, initialisers
from limbeck.students.depth import (
    CALIBRATION_TOKENS,
    By,
    calibration_text,
    choose_layers,
    cut,
    kept_layers,
    teacher_of,
)

Size = Annotated[int, Gt(0)] | None


@initialisers.register("width")
def width(
    origin: Origin,
    *,
    intermediate: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    hidden: Size = None,
    keep: Annotated[float, Gt(0), Le(1)] | None = None,
    params: int | str | None = None,
    layers: Annotated[int, Gt(0)] | tuple[Annotated[int, Ge(0)], ...] | None = None,
    by: By = "loss",
    calibration_tokens: Annotated[int, Gt(0)] = CALIBRATION_TOKENS,
    path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> InitialStudent:
    """The channels, heads and units with the largest activations, in all or some layers.

    Give one of three: sizes (some of `intermediate`, `heads`, `kv_heads`, `hidden`), keep, params.

    Args:
        intermediate: Inner size of the feed-forward layers.
        heads: Query heads, a multiple of `kv_heads`.
        kv_heads: Key and value heads.
        hidden: Hidden size.
        keep: Share of the teacher's parameters.
        params: Number of parameters, e.g. `60M`.
        layers: Number of layers kept as well, or a list of 0-based teacher layers.
        by: How they are chosen where `layers` is a number, as for `depth`.
        calibration_tokens: Positions of the training text on which importance is measured.
        path: Model to prune in place of the teacher, needed where the teacher has no weights here.
        revision: Commit, tag or branch of a model on the Hub.
        trust_remote_code: Run Python code that comes with the model.
    """
    sizes = {"intermediate": intermediate, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    if problem := sizes_problem(**sizes, keep=keep, params=params):
        raise ConfigError(problem)
    place = None if path is None else (path, revision, trust_remote_code)
    teacher, tokenizer, facts = teacher_of(origin, place)
    target = None if keep is None else round(keep * teacher.num_parameters)
    target = target if params is None else count_of(params)
    calibration = calibrate(teacher, calibration_text(origin), calibration_tokens)
    kept, chosen = remaining_layers(calibration, layers, by)
    model = teacher if len(kept) == teacher.num_layers else cut(teacher, kept, origin)
    old = widths_of(model.config)
    new = sized(old, **sizes) if target is None else widths_for(model.config, target)
    fits(old, new)
    parts = largest(mean_activations(model, calibration.batches), old, new)
    student = narrowed(model, parts, origin.device, origin.dtype)
    facts = {
        "origin": "width",
        "layers_kept": list(kept),
        "widths": asdict(new),
        "teacher_widths": asdict(old),
        "calibration_tokens": calibration.num_tokens,
        **shape_facts(student),
        **facts,
        **chosen,
    }
    return InitialStudent(student, tokenizer, LayerMap.surviving(kept), facts, asdict(parts))


def remaining_layers(
    calibration: Calibration, layers: int | tuple[int, ...] | None, by: By
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers a width student keeps, and how they were chosen if only their number is given."""
    total = calibration.teacher.num_layers
    if isinstance(layers, int) and layers != total:
        kept, chosen = choose_layers(calibration, layers, by)
        return kept, {"chosen": chosen}
    if isinstance(layers, tuple):
        return kept_layers(total, layers=layers, keep=None, drop=None), {}
    return tuple(range(total)), {}


def sizes_problem(*, keep: float | None, params: int | str | None, **sizes: Any) -> str | None:
    """What is wrong with the options of a width student's size; None if nothing is."""
    named = [name for name, value in sizes.items() if value is not None]
    ways = [*(["sizes"] if named else []), *(["keep"] if keep is not None else [])]
    ways += ["params"] if params is not None else []
    if len(ways) == 1:
        return None
    return (
        "a width student needs its sizes (intermediate, heads, kv_heads, hidden: one or more), or "
        "keep (a share of the teacher's parameters), or params (how many, as 60M), and exactly one "
        f"of the three, got {', '.join(ways) or 'none'}."
    )


def sized(old: Widths, **sizes: int | None) -> Widths:
    """A model's widths with some changed; heads and key-value heads keep their ratio."""
    new = replace(
        old,
        width=sizes["hidden"] or old.width,
        inner=sizes["intermediate"] or old.inner,
        heads=sizes["heads"] or old.heads,
        kv_heads=sizes["kv_heads"] or old.kv_heads,
    )
    if sizes["heads"] is None and sizes["kv_heads"] is not None:
        return replace(new, heads=old.heads // old.kv_heads * new.kv_heads)
    if sizes["kv_heads"] is None and old.kv_heads == old.heads:
        return replace(new, kv_heads=new.heads)
    return new


def fits(old: Widths, new: Widths) -> None:
    """Refuse widths beyond the teacher's, and heads that do not fill their groups."""
    options = {"hidden": "width", "intermediate": "inner", "heads": "heads", "kv_heads": "kv_heads"}
    before, after = asdict(old), asdict(new)
    wrong = [
        f"{option} {after[name]} (teacher: {before[name]})"
        for option, name in options.items()
        if after[name] > before[name]
    ]
    if wrong:
        raise ConfigError(
            f"A width student keeps at most what its teacher has, got {', '.join(wrong)}. Lower it."
        )
    if new.heads % new.kv_heads or new.heads // new.kv_heads > old.heads // old.kv_heads:
        raise ConfigError(
            f"Query heads come in groups of equal size, one for each key and value head, at most "
            f"{old.heads // old.kv_heads} in one, got heads {new.heads} and kv_heads "
            f"{new.kv_heads}. Set heads to a multiple of kv_heads."
        )
