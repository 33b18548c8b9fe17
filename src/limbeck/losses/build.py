"""Builds the objective that a recipe describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from limbeck.config import HeadBudget, ObjectiveConfig
from limbeck.config.schedules import Schedule, largest, smallest, value_at
from limbeck.errors import ConfigError
from limbeck.losses.divergences.base import divergences
from limbeck.losses.objective import Objective
from limbeck.losses.positions import positions
from limbeck.losses.terms.base import PairShapes, WeightedTerm, terms
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.losses.terms.divergence import DivergenceTerm
from limbeck.registry import Component, Problem, type_of

MAIN = ("divergence", "cross_entropy")
"""Names of the two terms that alpha weights."""

WEIGHT = TypeAdapter(Annotated[float, Ge(0)])


def build_objective(
    config: ObjectiveConfig, shapes: PairShapes, *, head_budget_mb: HeadBudget
) -> Objective:
    """Alpha T^2 D(teacher, student) + (1 - alpha) CE + the extra terms.

    A divergence that is null or whose weight is always 0 is omitted, so the teacher need not
    provide distributions. A cross-entropy of weight 0 is kept, because its value is logged.
    """
    problems = list(objective_problems(config))
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    weighted, alpha = [], config.alpha
    if config.divergence is not None and largest(config.divergence_weight) > 0:
        term = DivergenceTerm(shapes, divergence=config.divergence, temperature=config.temperature)
        weighted.append(WeightedTerm("divergence", partial(value_at, alpha), term))
    weighted.append(
        WeightedTerm("cross_entropy", partial(complement_at, alpha), CrossEntropyTerm(shapes))
    )
    for index, spec in enumerate(config.extra):
        build = terms.bind(own_options(spec), at=f"objective.extra[{index}]")
        weighted.append(WeightedTerm(name_of(spec), float(spec["weight"]), build(shapes)))
    chosen = None
    if config.positions is not None:
        chosen = positions.bind(config.positions, at="objective.positions")()
    return Objective(weighted, head_budget_mb, chosen)


def complement_at(alpha: float | Schedule, step: int) -> float:
    """Weight of the cross-entropy at an optimizer step."""
    return 1 - value_at(alpha, step)


def objective_problems(config: ObjectiveConfig) -> Iterator[Problem]:
    """Every mistake in an objective's divergence, positions and extra terms."""
    if config.divergence is not None:
        yield from divergences.problems(config.divergence, at="objective.divergence")
    if config.positions is not None:
        yield from positions.problems(config.positions, at="objective.positions")
    yield from absent_problems(config)
    taken = list(MAIN)
    for index, spec in enumerate(config.extra):
        at = f"objective.extra[{index}]"
        yield from weight_problems(spec, at)
        yield from terms.problems(own_options(spec), at=at)
        name = name_of(spec)
        if name in taken:
            remedy = "Give it a `name` of its own."
            yield Problem(f"{at}.name", f"another term is already logged as {name!r}. {remedy}")
        if not name.isidentifier() and type_of(spec):
            value = f"got {spec.get('name')!r}"
            yield Problem(f"{at}.name", f"must be a word of letters, digits and _, {value}.")
        taken.append(name)


def absent_problems(config: ObjectiveConfig) -> Iterator[Problem]:
    """An objective without its divergence that still needs one."""
    if config.divergence is not None:
        return
    if smallest(config.alpha) == 1 and not any(spec.get("weight") for spec in config.extra):
        yield Problem(
            "objective.divergence",
            "must not be null where nothing else is learned from: with alpha 1 the cross-entropy "
            "has weight 0, and no extra term has a weight. Name a divergence, or add a term.",
        )
    if config.temperature != 1:
        yield Problem(
            "objective.temperature",
            "softens the divergence, which is null. Remove it; extra terms have their own.",
        )


def weight_problems(spec: Component, at: str) -> Iterator[Problem]:
    """Mistakes in an extra term's weight."""
    if "weight" not in spec:
        yield Problem(f"{at}.weight", "is missing; weights are absolute, so each term needs one.")
        return
    try:
        WEIGHT.validate_python(spec["weight"])
    except ValidationError:
        yield Problem(f"{at}.weight", f"must be a number, at least 0, got {spec['weight']!r}.")


def own_options(spec: Component) -> Mapping[str, Any]:
    """The options of an extra term that its constructor takes."""
    return {key: value for key, value in spec.items() if key not in {"weight", "name"}}


def name_of(spec: Component) -> str:
    """The name an extra term is logged under: its `name`, by default its type."""
    return str(spec.get("name", type_of(spec)))
