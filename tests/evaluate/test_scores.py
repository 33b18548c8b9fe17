import dataclasses
import math

import numpy as np
import pytest

from limbeck.errors import DataError
from limbeck.evaluate.scores import (
    CALIBRATION_BINS,
    Scores,
    gap_recovered,
    interval,
    over_seeds,
    paired_difference,
    resampled,
    student_t,
)
from limbeck.evaluate.scores import summarise as summary


def made(documents: int = 40, seed: int = 0, kl: float = 1.0) -> Scores:
    """Scores whose per-token figures are drawn around known means."""
    generator = np.random.Generator(np.random.Philox(seed))
    counts = generator.integers(5, 50, documents).astype(float)
    noise = generator.normal(0, 0.2, documents)
    return Scores(
        metrics={
            "forward_kl": counts * (kl + noise),
            "cross_entropy": counts * (2.0 + noise),
            "student_confidence": counts * 0.6,
            "student_hit": counts * 0.5,
        },
        counts=counts,
        bytes=counts * 4,
        calibration=np.zeros((documents, CALIBRATION_BINS)),
        documents=np.arange(documents),
    )


def test_figures_are_ratios_of_sums_and_not_means_of_means() -> None:
    scores = made()
    told = summary(scores)
    wanted = scores.metrics["forward_kl"].sum() / scores.counts.sum()
    assert told["forward_kl"]["value"] == pytest.approx(wanted, rel=1e-12)
    assert told["perplexity"]["value"] == pytest.approx(math.exp(scores.mean("cross_entropy")))
    assert told["over_confidence"]["value"] == pytest.approx(0.1)


def test_bits_per_byte_is_what_one_counts_by_hand() -> None:
    zeros = np.zeros((2, CALIBRATION_BINS))
    sums = {
        "cross_entropy": np.array([3 * math.log(2), math.log(2)]),  # 3 bits and 1 bit
        "student_confidence": np.ones(2),
        "student_hit": np.ones(2),
    }
    scores = Scores(sums, np.array([2.0, 1.0]), np.array([6.0, 2.0]), zeros, np.arange(2))
    assert summary(scores)["bits_per_byte"]["value"] == pytest.approx(4 / 8)


def test_calibration_error_sums_the_gaps_of_bins_over_documents_first() -> None:
    calibration = np.zeros((2, CALIBRATION_BINS))
    calibration[0, 3], calibration[1, 3], calibration[1, 9] = 1.0, -1.0, -2.0  # bin 3 cancels
    sums = {name: np.ones(2) for name in ("cross_entropy", "student_confidence", "student_hit")}
    scores = Scores(sums, np.array([4.0, 6.0]), np.ones(2), calibration, np.arange(2))
    assert summary(scores)["ece"]["value"] == pytest.approx(0.2)


def test_the_interval_of_the_calibration_error_is_around_it() -> None:
    generator = np.random.Generator(np.random.Philox(3))
    scores = made()
    noise = generator.normal(0, 3, scores.calibration.shape)
    told = summary(dataclasses.replace(scores, calibration=noise))["ece"]
    assert told["low"] <= told["value"] <= told["high"]
    assert told["low"] < told["high"]


def test_intervals_cover_a_known_mean_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(40):
        told = summary(made(seed=seed))["forward_kl"]
        covered += told["low"] <= 1.0 <= told["high"]
    assert 33 <= covered <= 40  # 38 expected; 33 or fewer happens once in 150 honest runs


def test_intervals_are_the_same_every_time_and_another_seed_gives_others() -> None:
    scores = made()
    assert summary(scores) == summary(scores)
    table = {"kl": scores.metrics["forward_kl"], "tokens": scores.counts}
    drawn = [resampled(table), resampled(table, seed=1)]
    first, other = (interval(sums["kl"] / sums["tokens"]) for sums in drawn)
    assert summary(scores)["forward_kl"] == pytest.approx(first)
    assert first["low"] != other["low"]
    assert first["value"] == other["value"]


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_interval_over_seeds_covers_the_mean_of_all_seeds(seeds: int) -> None:
    """Seeds differ by more than documents; an interval over documents alone would miss it."""
    generator = np.random.Generator(np.random.Philox(3))
    covered, by_documents = 0, 0
    for _ in range(100):
        kl = 1.0 + generator.normal(0, 0.2, seeds)
        runs = [made(seed=7, kl=value) for value in kl]
        found = over_seeds(runs, "forward_kl")
        truth = made(seed=7).mean("forward_kl")
        covered += found["low"] <= truth <= found["high"]
        alone = over_seeds(runs[:1], "forward_kl")
        by_documents += alone["low"] <= truth <= alone["high"]
        assert found["each"] == pytest.approx([run.mean("forward_kl") for run in runs])
        assert found["value"] == pytest.approx(np.mean(found["each"]))
    assert covered >= 90
    assert by_documents < 60


def test_a_difference_over_seeds_pairs_documents_and_seeds() -> None:
    own, other = ([made(seed=s, kl=kl) for s in (1, 1)] for kl in (1.5, 1.2))
    found = over_seeds(own, "forward_kl", other)
    assert found["each"] == pytest.approx([0.3, 0.3])
    assert found["high"] - found["low"] < 1e-9  # documents and seeds differ by the same
    with pytest.raises(ValueError, match="shorter"):
        over_seeds(own, "forward_kl", other[:1])
    with pytest.raises(DataError, match="measured on the same tokens"):
        over_seeds(own, "forward_kl", [made(seed=1), made(seed=2)])


def test_the_paired_difference_of_a_model_with_itself_is_exactly_zero() -> None:
    scores = made()
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert paired_difference(scores, scores, "forward_kl") == nothing


def test_paired_intervals_are_narrower_than_unpaired_ones() -> None:
    told = paired_difference(made(kl=1.5), made(kl=1.0), "forward_kl")
    assert told["value"] == pytest.approx(0.5)
    assert told["high"] - told["low"] < 1e-9
    alone = summary(made())["forward_kl"]
    assert alone["high"] - alone["low"] > 0.05


def test_gap_recovered_is_100_for_the_teacher_and_0_for_the_initial_student() -> None:
    start, end = made(kl=2.0), made()
    end = Scores(
        {"forward_kl": 0 * end.counts}, end.counts, end.bytes, end.calibration, end.documents
    )
    assert gap_recovered(start, end)["value"] == 100.0
    assert gap_recovered(start, start) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert gap_recovered(made(kl=1.0), made(kl=2.0))["value"] < -90


def test_a_student_that_starts_as_its_teacher_has_no_gap_to_recover() -> None:
    scores = made(documents=1)
    zero = Scores({"forward_kl": 0 * scores.counts}, scores.counts, scores.bytes,
                  scores.calibration, scores.documents)  # fmt: skip
    with pytest.raises(DataError, match="forward KL is 0"):
        gap_recovered(zero, zero)


def test_scores_of_other_tokens_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="same tokens"):
        paired_difference(made(seed=0), made(seed=1), "forward_kl")


def test_no_scored_token_is_refused() -> None:
    none = np.zeros(0)
    scores = Scores({}, none, none, np.zeros((0, CALIBRATION_BINS)), np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="got none"):
        summary(scores)


@pytest.mark.parametrize("documents", [6, 9, 20])
def test_intervals_of_few_documents_are_as_wide_as_student_t(documents: int) -> None:
    """On average: what scipy.stats.t gives for the mean of normal documents."""
    wide = {6: 2.571, 9: 2.306, 20: 2.093}[documents]  # the 97.5 % quantile of t
    generator = np.random.Generator(np.random.Philox(documents))
    ratios, missed = [], 0
    for _ in range(60):
        values = generator.normal(size=documents)
        found = interval(resampled({"a": values})["a"] / documents)
        exact = wide * values.std(ddof=1) / math.sqrt(documents)
        ratios.append((found["high"] - found["low"]) / (2 * exact))
        missed += not found["low"] <= 0 <= found["high"]
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)
    assert missed <= 9  # 3 expected; 10 and more happen once in 1,500


def test_student_t_is_that_of_tables() -> None:
    for freedom, wanted in ((2, 4.303), (4, 2.776), (8, 2.306), (19, 2.093), (999, 1.962)):
        assert student_t(1.959964, freedom) == pytest.approx(wanted, rel=0.01)
