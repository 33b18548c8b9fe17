"""The answer of pilots: a recipe's figures at several budgets, and the tokens to a divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.config import RunConfig
from limbeck.data.mixture import MOST_PASSES
from limbeck.errors import ConfigError
from limbeck.evaluate.scaling import ScalingLaw, fit_curve
from limbeck.evaluate.scores import Interval, require_same_tokens
from limbeck.experiment.forecast import Alternative, Pilot, Pilots, facts, measured
from limbeck.report.run_files import Figure
from limbeck.report.words import interval

METRICS = ("forward_kl", "cross_entropy")
MULTIPLES = {"half": 0.5, "recipe": 1.0, "twice": 2.0, "four times": 4.0}
"""Budgets of the table, times the recipe's tokens."""
CURVE_POINTS = 30


@dataclass(frozen=True)
class ForecastOptions:
    """What a user wants to know besides the recipe's own figures.

    Attributes:
        tokens: A budget of scored tokens.
        hours: A budget of training time.
        target_kl: A forward KL to be reached, nats a token.
    """

    tokens: int | None = None
    hours: float | None = None
    target_kl: float | None = None


def forecast(
    config: RunConfig,
    pilots: Sequence[Pilot],
    options: ForecastOptions,
    alternative: Alternative | None = None,
) -> dict[str, Any]:
    """The answer as JSON; figures that the pilots do not determine are null.

    Raises:
        ConfigError: The pilots do not determine the student's figure at the recipe's tokens.
    """
    known_facts = facts(config)
    times = known_facts["passes"]
    if times > MOST_PASSES:
        raise ConfigError(
            f"A forecast needs a recipe that reads its text at most {MOST_PASSES:g} times, and "
            f"this one reads it {times:.3g} times: its pilots read it once or less, and a text "
            "that is read again teaches less than their curve says. Give more text, or lower "
            "optim.steps."
        )
    found = measured(pilots)
    known = [m for m in METRICS if m in found["distilled"].runs[0].scores.metrics]
    curves = {
        name: {metric: fit_curve(each.runs, metric) for metric in known}
        for name, each in found.items()
    }
    main = found["distilled"]
    tokens = main.tokens_per_step * config.optim.num_steps
    require_determined(curves["distilled"][known[0]], known[0], tokens)
    most = most_tokens(times, tokens)
    rows = budgets(tokens, options, main)
    compared = None
    if alternative is not None:
        curve = curves["distilled"][known[0]]
        compared = against(curve, main, alternative, known[0], rows, most)
    return {
        "recipe": {"steps": config.optim.num_steps, "tokens": round(tokens), "passes": times},
        "pilots": list(pilot_rows(pilots, found, known)),
        "students": {
            name: {
                "tokens_per_second": 1 / found[name].seconds_per_token,
                **{metric: parameters(curve) for metric, curve in each.items()},
            }
            for name, each in curves.items()
        },
        "rows": [
            {
                "budget": label,
                "tokens": round(budget),
                "hours": {n: budget * p.seconds_per_token / 3600 for n, p in found.items()},
                **{name: figures(each, budget, most) for name, each in curves.items()},
            }
            for label, budget in rows.items()
        ],
        "target": target(curves["distilled"], main, options.target_kl, most),
        "curves": {name: points(each[known[0]], tokens, most) for name, each in curves.items()},
        "metric": known[0],
        "parameters": known_facts["parameters"],
        "against": compared,
    }


def against(
    curve: ScalingLaw,
    pilots: Pilots,
    alternative: Alternative,
    metric: str,
    rows: Mapping[str, float],
    most: float,
) -> dict[str, Any]:
    """Another recipe's student at the same tokens, and after the same time; a difference is
    this recipe's figure less the other's.

    Args:
        rows: Tokens of each budget.
        most: Tokens beyond which this recipe's text would be read too often.
    """
    theirs, known = measured(alternative.pilots)["distilled"], facts(alternative.config)
    require_same_tokens([run.scores for run in (*pilots.runs, *theirs.runs)])
    other = fit_curve(theirs.runs, metric, seed=2)
    their_most = most_tokens(
        known["passes"], theirs.tokens_per_step * alternative.config.optim.num_steps
    )

    def compared(budget: float, their_budget: float) -> Interval | None:
        is_known = min(curve.fall["low"], other.fall["low"]) > 0
        is_new = budget <= most and their_budget <= their_most
        return curve.difference(budget, other, their_budget) if is_known and is_new else None

    found = []
    for label, budget in rows.items():
        seconds = budget * pilots.seconds_per_token
        their_budget = seconds / theirs.seconds_per_token
        found.append(
            {
                "budget": label,
                "hours": seconds / 3600,
                "tokens": round(their_budget),
                "other": figures({metric: other}, their_budget, their_most)[metric],
                "difference": compared(budget, their_budget),
                "difference_at_equal_tokens": compared(budget, budget),
            }
        )
    return {"name": alternative.name, "parameters": known["parameters"], "rows": found}


def most_tokens(passes: float, tokens: float) -> float:
    """Tokens beyond which a text would be read too often, of which `tokens` make so many passes."""
    return MOST_PASSES / passes * tokens if passes else math.inf


def require_determined(curve: ScalingLaw, metric: str, tokens: float) -> None:
    """Refuse a forecast that would say less than the pilots themselves."""
    fall, figure = curve.fall, curve.at(tokens)
    more = (
        "Give the recipe more steps, if need be of fewer tokens: pilots of few steps vary most. "
        "More pilots (--pilots) and more held-out text (evaluate.max_tokens) help as well."
    )
    first, last = (f"{budget:,.0f}" for budget in curve.tokens[[0, -1]])
    if fall["low"] <= 0:
        raise ConfigError(
            f"The {metric} of pilots must fall with their tokens for a curve, and from {first} to "
            f"{last} tokens it falls by {interval(Figure(**fall))}: not distinguishable from 0. "
            f"{more}"
        )
    if not curve.determines(tokens):
        raise ConfigError(
            f"A forecast's interval must be narrower than the fall it predicts, and the pilots "
            f"leave the {metric} at {tokens:,.0f} tokens at {interval(Figure(**figure))}, after "
            f"{curve.values[0, -1]:.3f} at {last} tokens; runs vary by {curve.run_noise:.1%}. "
            f"{more}"
        )


def pilot_rows(pilots: Sequence[Pilot], found: Mapping[str, Pilots], metrics: Sequence[str]) -> Any:
    """Each pilot's tokens and measured figures."""
    for place, pilot in enumerate(pilots):
        runs = {name: each.runs[place] for name, each in found.items()}
        yield {
            "name": pilot.name,
            "steps": pilot.config.optim.num_steps,
            "seed": pilot.config.seed,
            "tokens": round(runs["distilled"].tokens),
            **{n: {m: run.scores.mean(m) for m in metrics} for n, run in runs.items()},
        }


def parameters(curve: ScalingLaw) -> dict[str, float]:
    """E, B and beta of the fit to all documents, and how much runs vary around it."""
    scale = curve.scale[0] * curve.tokens[-1] ** curve.exponent[0]
    return {
        "E": float(curve.floor[0]),
        "B": float(scale),
        "beta": float(curve.exponent[0]),
        "run_noise": curve.run_noise,
    }


def budgets(tokens: float, options: ForecastOptions, pilots: Pilots) -> dict[str, float]:
    """Budgets of the table by name, ascending."""
    found = {label: multiple * tokens for label, multiple in MULTIPLES.items()}
    if options.tokens is not None:
        found["--budget"] = float(options.tokens)
    if options.hours is not None:
        found["--hours"] = options.hours * 3600 / pilots.seconds_per_token
    return dict(sorted(found.items(), key=lambda item: item[1]))


def figures(
    curves: Mapping[str, ScalingLaw], tokens: float, most: float
) -> dict[str, Interval | None]:
    """Every metric at a budget; none where the text would be read too often."""
    is_new = tokens <= most
    return {metric: figure(curve, tokens) if is_new else None for metric, curve in curves.items()}


def figure(curve: ScalingLaw, tokens: float) -> Interval | None:
    """A metric at a budget; None where a curve that must reach beyond its pilots cannot."""
    is_known = tokens <= curve.tokens[-1] or (curve.fall["low"] > 0 and curve.determines(tokens))
    return curve.at(tokens) if is_known else None


def target(
    curves: Mapping[str, ScalingLaw], pilots: Pilots, value: float | None, most: float
) -> Any:
    """Tokens and hours to a forward KL; an end that the curve never reaches is null.

    Args:
        most: Tokens beyond which the recipe's text would be read too often.
    """
    if value is None:
        return None
    if "forward_kl" not in curves:
        raise ConfigError(
            "--target-kl needs a teacher with whole distributions, and this one's forward KL is "
            "not known. Leave it out, or use another teacher."
        )
    found = curves["forward_kl"].tokens_to(value)
    needed = {end: tokens if np.isfinite(tokens) else None for end, tokens in found.items()}
    hours = {
        end: None if tokens is None else tokens * pilots.seconds_per_token / 3600
        for end, tokens in needed.items()
    }
    needs_text = found["value"] > most
    return {"forward_kl": value, "tokens": needed, "hours": hours, "needs_text": needs_text}


def points(curve: ScalingLaw, tokens: float, most: float) -> list[dict[str, float]]:
    """The curve with its interval, from the smallest pilot to the largest budget of the table."""
    ends = (curve.tokens[0], min(max(MULTIPLES.values()) * tokens, most))
    return [{"tokens": float(d), **curve.at(d)} for d in np.geomspace(*ends, CURVE_POINTS)]
