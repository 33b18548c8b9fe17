"""A metric of finished runs as a function of their training tokens, and its extrapolation.

L(D) = E + B / D^beta, the published form in D where the models are fixed (Hoffmann et al., 2022,
arXiv:2203.15556). The law of distillation (Busbridge et al., 2025, arXiv:2502.08606, equation 8)
is, with student and teacher fixed, E + (A + B / D^beta)^gamma: the same for gamma 1, or where the
student's size does not limit it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.scores import Interval, Scores, interval, require_same_tokens, resampled

MIN_BUDGETS = 3
"""Numbers of tokens that three parameters need."""
EXPONENTS = (0.02, 3.0)
"""Range of beta. Published exponents of tokens lie between 0.1 and 0.6; a student that was just
pruned recovers faster."""
COARSE, FINE, ROUNDS = 25, 7, 8
"""Exponents tried at first, and in each round between the neighbours of the best."""


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run.

    Attributes:
        tokens: Scored tokens it was trained on.
        scores: On test documents that all runs share.
    """

    tokens: float
    scores: Scores


@dataclass(frozen=True)
class ScalingLaw:
    """Fits of L(D) = E + B / (D / D_max)^beta.

    Entry 0 is the fit to all documents. Each other entry is the fit to one resample of the
    documents with one draw of the noise between runs.

    Attributes:
        tokens: The budgets D of the runs, ascending; the last is D_max.
        values: The metric at each budget, a mean over runs of that budget.
        noise: Natural log of the factor by which a longer run would miss its own curve.
        run_noise: Relative standard deviation of a run around the curve.
    """

    tokens: Float64[np.ndarray, " budgets"]
    values: Float64[np.ndarray, "fits budgets"]
    floor: Float64[np.ndarray, " fits"]
    scale: Float64[np.ndarray, " fits"]
    exponent: Float64[np.ndarray, " fits"]
    noise: Float64[np.ndarray, " fits"]
    run_noise: float

    def at(self, tokens: float) -> Interval:
        """The metric of a run of so many tokens, and its 95 % prediction interval."""
        return interval(self._at(tokens))

    @property
    def fall(self) -> Interval:
        """How far the metric of the largest runs lies below that of the smallest."""
        return interval(self.values[:, 0] - self.values[:, -1])

    def determines(self, tokens: float) -> bool:
        """Whether the interval is narrower than the difference to the largest pilot."""
        found = self.at(tokens)
        return found["high"] - found["low"] < abs(float(self.values[0, -1]) - found["value"])

    def tokens_to(self, value: float) -> Interval:
        """Tokens of a run that reaches a value; infinite where it never does."""
        above = value / np.exp(self.noise) - self.floor
        reached = (above > 0) & (self.scale > 0)
        ratio = self.scale / np.where(reached, above, 1.0)
        with np.errstate(over="ignore", divide="ignore"):
            needed = np.where(reached, ratio ** (1 / self.exponent), math.inf) * self.tokens[-1]
        low, high = np.percentile(needed[1:], [2.5, 97.5], method="nearest")
        return {"value": float(needed[0]), "low": float(low), "high": float(high)}

    def difference(self, tokens: float, other: ScalingLaw, other_tokens: float) -> Interval:
        """The metric less that of another curve at its tokens, and its 95 % prediction interval.

        Both must be fits to the same documents, and need seeds of their own (`fit_curve`).
        """
        return interval(self._at(tokens) - other._at(other_tokens))

    def _at(self, tokens: float) -> Float64[np.ndarray, " fits"]:
        power = (tokens / self.tokens[-1]) ** -self.exponent
        found: Float64[np.ndarray, " fits"] = (self.floor + self.scale * power) * np.exp(self.noise)
        return found


def fit_curve(runs: Sequence[MeasuredRun], metric: str, seed: int = 1) -> ScalingLaw:
    """The curve of a metric over runs of several budgets.

    Documents are resampled, the same for all runs. The noise between runs comes from runs of one
    budget that differ in their seed and from what the law leaves unexplained, its standard
    deviation drawn from a scaled inverse chi-squared distribution.

    Args:
        seed: Of the noise; another one for a curve whose difference from this one is asked. 0 is
            that of the resamples.

    Raises:
        ConfigError: Fewer than three budgets, or no run more than budgets, so that the noise
            cannot be known.
        DataError: The runs were measured on other tokens, or the metric is not above 0.
    """
    tokens = np.array([run.tokens for run in runs], dtype=float)
    budgets, place, repeats = np.unique(tokens, return_inverse=True, return_counts=True)
    if len(budgets) < MIN_BUDGETS or len(runs) <= MIN_BUDGETS:
        raise ConfigError(
            f"A curve needs runs of at least {MIN_BUDGETS} numbers of tokens, and one run more to "
            f"know how runs vary; got {len(runs)} runs of {len(budgets)}. Use more pilots."
        )
    values = resampled_means(runs, metric)
    weights = repeats / group_means(values[:1], place, repeats)[0] ** 2
    means = group_means(values[:1], place, repeats)
    first = np.column_stack(fit(budgets / budgets[-1], means, weights))[0]
    expected = first[0] + first[1] * (budgets / budgets[-1]) ** -first[2]
    freedom = len(runs) - MIN_BUDGETS
    run_noise = math.sqrt(float(((values[0] / expected[place] - 1) ** 2).sum()) / freedom)
    generator = np.random.Generator(np.random.Philox(seed))
    size = len(values)
    spread = run_noise * np.sqrt(freedom / generator.chisquare(freedom, size))
    spread[0] = 0.0
    values = values * np.exp(spread[:, None] * generator.normal(size=values.shape))
    means = group_means(values, place, repeats)
    floor, scale, exponent = fit(budgets / budgets[-1], means, weights)
    noise = spread * generator.normal(size=size)
    return ScalingLaw(budgets, means, floor, scale, exponent, noise, run_noise)


def resampled_means(runs: Sequence[MeasuredRun], metric: str) -> Float64[np.ndarray, "fits runs"]:
    """The metric of every run: on all documents, then on the same resamples of them."""
    require_same_tokens([run.scores for run in runs])
    first = runs[0].scores
    table = {str(i): run.scores.metrics[metric] for i, run in enumerate(runs)}
    sums = resampled({**table, "tokens": first.counts})
    values = np.stack([sums[name] / sums["tokens"] for name in table], axis=1)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise DataError(
            f"A curve needs a {metric} above 0 on every resample of the documents, and it has none "
            f"in a run of {runs[0].tokens:,.0f} tokens or more. Give more held-out documents."
        )
    return values


def group_means(
    values: Float64[np.ndarray, "fits runs"], place: np.ndarray, repeats: np.ndarray
) -> Float64[np.ndarray, "fits budgets"]:
    """Means over the runs of each budget."""
    member = place.reshape(-1, 1) == np.arange(len(repeats))
    means: Float64[np.ndarray, "fits budgets"] = values @ (member / repeats)
    return means


def fit(
    tokens: Float64[np.ndarray, " budgets"],
    values: Float64[np.ndarray, "fits budgets"],
    weights: Float64[np.ndarray, " budgets"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, B and beta with the least weighted squares, E and B at least 0, for each row of values.

    For one beta, E and B have a closed form; beta is found on a grid that is refined around its
    best.
    """
    low, high = (np.full(len(values), math.log(end)) for end in EXPONENTS)
    for step in range(ROUNDS):
        share = np.linspace(0, 1, COARSE if step == 0 else FINE)
        tried = low[:, None] + share * (high - low)[:, None]
        floor, scale, error = linear(tokens, values, weights, np.exp(tried))
        best = error.argmin(axis=1)
        rows = np.arange(len(values))
        low = tried[rows, np.maximum(best - 1, 0)]
        high = tried[rows, np.minimum(best + 1, len(share) - 1)]
    return floor[rows, best], scale[rows, best], np.exp(tried[rows, best])


def linear(
    tokens: Float64[np.ndarray, " budgets"],
    values: Float64[np.ndarray, "fits budgets"],
    weights: Float64[np.ndarray, " budgets"],
    exponents: Float64[np.ndarray, "fits grid"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, B and the weighted squared error for each exponent."""
    x = tokens ** -exponents[..., None]
    y, w = values[:, None, :], weights / weights.sum()
    mean_x, mean_y = (w * x).sum(-1), (w * y).sum(-1)
    spread = (w * (x - mean_x[..., None]) ** 2).sum(-1)
    scale = (w * (x - mean_x[..., None]) * (y - mean_y[..., None])).sum(-1) / spread
    floor = mean_y - scale * mean_x
    scale = np.where(floor < 0, (w * x * y).sum(-1) / (w * x * x).sum(-1), scale)
    floor = np.where(floor < 0, 0.0, floor)
    floor, scale = np.where(scale < 0, mean_y, floor), np.where(scale < 0, 0.0, scale)
    error = (w * (y - floor[..., None] - scale[..., None] * x) ** 2).sum(-1)
    return floor, scale, error
