"""The fit of L(D) = E + B / D^beta, its interval, and when it says nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest

from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.scaling import MeasuredRun, fit, fit_curve
from limbeck.evaluate.scores import CALIBRATION_BINS, Scores

BUDGETS = (1_000.0, 1_000.0, 2_000.0, 2_000.0, 4_000.0, 8_000.0)


def scores(kl: np.ndarray, counts: np.ndarray) -> Scores:
    """Scores of documents whose tokens have this forward KL on average."""
    size = len(kl)
    bins = np.zeros((size, CALIBRATION_BINS))
    return Scores({"forward_kl": kl * counts}, counts, counts * 4, bins, np.arange(size))


def pilots(law, documents: int, noise: float, generator: np.random.Generator) -> list[MeasuredRun]:
    """Runs whose documents follow laws of their own, and which vary from run to run."""
    counts = generator.integers(40, 120, documents).astype(float)
    floors, scales = generator.gamma(8, 1 / 8, documents), generator.gamma(8, 1 / 8, documents)
    found = []
    for tokens in BUDGETS:
        kl = law(tokens, floors, scales) * math.exp(noise * generator.normal())
        kl = kl * np.exp(generator.normal(0, 0.02, documents))
        found.append(MeasuredRun(tokens, scores(kl, counts)))
    return found


def law(tokens, floor=1.0, scale=1.0):
    return 0.4 * floor + 60 * scale / tokens**0.5


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("exponent", [0.15, 0.5, 1.2])
def test_a_curve_without_noise_is_recovered(floor, exponent):
    tokens = np.array([1.0, 2.0, 4.0, 8.0]) / 8
    values = floor + 1.5 * tokens**-exponent
    found = np.ravel(fit(tokens, values[None], 1 / values**2))
    assert found == pytest.approx([floor, 1.5, exponent], rel=1e-3, abs=1e-3)


def test_a_value_is_reached_with_the_tokens_that_give_it():
    one = np.ones(1)
    curve = fit_curve(
        [MeasuredRun(t, scores(law(t) * one, 50 * one)) for t in BUDGETS], "forward_kl"
    )
    for tokens in (16_000.0, 100_000.0):
        assert curve.at(tokens)["value"] == pytest.approx(law(tokens), rel=1e-4)
        assert curve.tokens_to(law(tokens))["value"] == pytest.approx(tokens, rel=1e-2)
    assert curve.tokens_to(0.39)["value"] == math.inf


def test_the_interval_has_its_nominal_coverage():
    """Of 60 sets of pilots, the longer run's figure lies in about 95 % of the intervals."""
    generator = np.random.Generator(np.random.Philox(5))
    target, noise, held = 90_000.0, 0.01, 0
    for _ in range(60):
        found = fit_curve(pilots(law, 60, noise, generator), "forward_kl").at(target)
        truth = law(target) * math.exp(noise * generator.normal())
        held += found["low"] <= truth <= found["high"]
    assert 54 <= held <= 60


def test_the_interval_of_a_difference_has_its_nominal_coverage():
    """Two students on the same documents; runs of each vary independently of the other's."""
    generator = np.random.Generator(np.random.Philox(6))
    tokens, noise, held = (90_000.0, 60_000.0), 0.01, 0
    for _ in range(60):
        documents = generator.integers(2**32)
        runs = []
        for factor in (1.0, 1.2):
            same = np.random.Generator(np.random.Philox(documents))
            found = pilots(lambda t, f, s, factor=factor: factor * law(t, f, s), 60, 0, same)
            runs.append([varied(run, noise, generator) for run in found])
        curves = [fit_curve(each, "forward_kl", seed) for seed, each in enumerate(runs, 1)]
        found = curves[0].difference(tokens[0], curves[1], tokens[1])
        ends = [law(t) * math.exp(noise * generator.normal()) for t in tokens]
        held += found["low"] <= ends[0] - 1.2 * ends[1] <= found["high"]
        assert found["value"] == pytest.approx(
            curves[0].at(tokens[0])["value"] - curves[1].at(tokens[1])["value"]
        )
    assert 54 <= held <= 60


def varied(run, noise, generator):
    """A run whose every document is off by one factor."""
    kl = run.scores.metrics["forward_kl"] * math.exp(noise * generator.normal())
    return MeasuredRun(run.tokens, replace(run.scores, metrics={"forward_kl": kl}))


def test_more_documents_and_less_noise_narrow_the_interval():
    def width(documents, noise):
        generator = np.random.Generator(np.random.Philox(1))
        found = fit_curve(pilots(law, documents, noise, generator), "forward_kl").at(50_000.0)
        return found["high"] - found["low"]

    assert width(400, 0.003) < width(400, 0.03)
    assert width(400, 0.003) < width(20, 0.003)


def test_pilots_that_vary_more_than_they_fall_determine_nothing():
    generator = np.random.Generator(np.random.Philox(2))
    steady = fit_curve(pilots(law, 100, 0.002, generator), "forward_kl")
    assert steady.determines(50_000.0)
    assert steady.fall["low"] > 0
    wild = fit_curve(pilots(law, 100, 0.2, generator), "forward_kl")
    assert not wild.determines(50_000.0)
    flat = fit_curve(pilots(lambda t, f, s: f, 100, 0.01, generator), "forward_kl")
    assert flat.fall["low"] < 0 < flat.fall["high"]


@pytest.mark.parametrize("count", [2, 3])
def test_too_few_pilots_are_refused(count):
    one = np.ones(1)
    runs = [MeasuredRun(t, scores(law(t) * one, 50 * one)) for t in (1e3, 2e3, 4e3)[:count]]
    with pytest.raises(ConfigError, match=f"got {count} runs of {count}"):
        fit_curve(runs, "forward_kl")


def test_runs_on_other_documents_are_refused():
    one = np.ones(2)
    runs = [MeasuredRun(t, scores(law(t) * one, 50 * one)) for t in BUDGETS]
    runs[-1] = MeasuredRun(9e3, scores(law(9e3) * one, 51 * one))
    with pytest.raises(DataError, match="100 tokens of 2 documents and 102 of 2"):
        fit_curve(runs, "forward_kl")
