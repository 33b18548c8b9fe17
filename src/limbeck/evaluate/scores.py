"""Sums per document, and metrics from them: values with intervals, differences, the gap closed.

Every metric is a ratio of sums. Its interval is the percentile bootstrap over documents (Efron,
1979): documents are drawn with replacement, and the ratio is computed again. Of few documents fewer
are drawn than there are, because intervals would be too narrow (see `num_drawn`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from limbeck.errors import DataError
from limbeck.evaluate.groups import DECILES, GROUPED, POSITIONS, Group, by_source

RESAMPLES = 1000
INTERVAL_PERCENT = 95.0
CALIBRATION_BINS = 15

Interval = dict[str, float]
"""`{"value", "low", "high"}`: a metric and the ends of its 95 % interval."""

MEANS = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "top1_agreement",
    "top5_agreement",
    "cross_entropy",
    "teacher_cross_entropy",
    "teacher_entropy",
)
"""Metrics that are a mean over tokens; a teacher without whole distributions has only some."""


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens of each document that was measured.

    Attributes:
        metrics: By name, the sum over a document's tokens (nats, or counts).
        counts: Number of tokens measured.
        bytes: UTF-8 bytes of the text of those tokens.
        calibration: Sum of (hit - confidence) of the student's top token, by confidence bin.
        documents: Index of each document in the data set.
        sources: Source of each document, its file by default; empty where unknown.
        groups: The sums again, by `position` and by `teacher_entropy`, whose groups are deciles.
        padded_mass: The student's mean probability on rows beyond the vocabulary.
    """

    metrics: Mapping[str, Float64[np.ndarray, " documents"]]
    counts: Float64[np.ndarray, " documents"]
    bytes: Float64[np.ndarray, " documents"]
    calibration: Float64[np.ndarray, "documents bins"]
    documents: Int64[np.ndarray, " documents"]
    sources: Sequence[str] = ()
    groups: Mapping[str, Group] = field(default_factory=dict)
    padded_mass: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens measured."""
        return round(float(self.counts.sum()))

    def mean(self, metric: str) -> float:
        """A metric's mean over all measured tokens; NaN when there are none."""
        total = float(self.counts.sum())
        return float(self.metrics[metric].sum()) / total if total else math.nan


Sums = Mapping[str, Float64[np.ndarray, " resamples"]]
Figure = Callable[[Sums], Float64[np.ndarray, " resamples"]]


def summarise(scores: Scores) -> dict[str, Interval]:
    """Every metric with its interval.

    Divergences, cross-entropies and entropies are nats a token, perplexity is exp(cross_entropy),
    acceptance is 1 - total_variation, the sum of min(student, teacher): the share of the student's
    samples that speculative decoding accepts (Leviathan et al., 2023, arXiv:2211.17192).
    bits_per_byte compares across tokenizers, over_confidence is the student's
    mean probability of its top token minus its accuracy, and ece is the expected calibration error
    over 15 bins. With one document the interval has no width and is meaningless.

    Raises:
        DataError: No token was measured.
    """
    if not scores.num_tokens:
        raise DataError(
            "At least one held-out token must be scored to evaluate, got none. Give evaluate.data "
            "rows with text that is not only prompt."
        )
    sums = resampled(columns(scores))
    figures = {m: ratio(m, "tokens") for m in MEANS if m in scores.metrics}
    figures["perplexity"] = lambda s: np.exp(s["cross_entropy"] / s["tokens"])
    figures["bits_per_byte"] = bits_per_byte
    if "total_variation" in scores.metrics:
        figures["acceptance"] = lambda s: 1 - s["total_variation"] / s["tokens"]
    figures["over_confidence"] = over_confidence
    figures["ece"] = expected_calibration_error
    return {name: interval(figure(sums)) for name, figure in figures.items()}


def breakdown(scores: Scores) -> dict[str, list[dict[str, Any]]]:
    """Metrics with intervals in each group of tokens that is not empty, by kind of group.

    Returns:
        For `position`, `teacher_entropy` (deciles, the most certain first) and, where the text has
        several sources, `source`: a list of `{"group", "tokens", metric: interval}`.
    """
    kinds: dict[str, tuple[Sequence[str], Group]] = {}
    labels = {"position": POSITIONS, "teacher_entropy": [str(1 + i) for i in range(DECILES)]}
    kinds |= {kind: (labels[kind], group) for kind, group in scores.groups.items()}
    if len(set(scores.sources)) > 1:
        metrics = {m: scores.metrics[m] for m in GROUPED if m in scores.metrics}
        kinds["source"] = by_source(scores.sources, {"tokens": scores.counts, **metrics})
    return {kind: list(group_rows(names, group)) for kind, (names, group) in kinds.items()}


def group_rows(names: Sequence[str], group: Group) -> Iterator[dict[str, Any]]:
    """The figures of each group with tokens."""
    for index, name in enumerate(names):
        columns = {metric: sums[:, index] for metric, sums in group.items()}
        present = columns["tokens"] > 0  # a resample without tokens of the group has no mean
        if present.any():
            sums = resampled({m: column[present] for m, column in columns.items()})
            means = {m: interval(ratio(m, "tokens")(sums)) for m in columns if m != "tokens"}
            yield {"group": name, "tokens": round(float(sums["tokens"][0])), **means}


def paired_difference(a: Scores, b: Scores, metric: str) -> Interval:
    """Mean of a metric under `a` minus that under `b`, with the same resampled documents.

    Raises:
        DataError: They were not measured on the same tokens.
    """
    both = paired(a, b, metric)
    return interval(both["a"] / both["tokens"] - both["b"] / both["tokens"])


def teacher_advantage(scores: Scores) -> Interval:
    """The student's cross-entropy less its teacher's on the same tokens, nats a token.

    Below 0 the student predicts the text better than its teacher.
    """
    both = ("cross_entropy", "teacher_cross_entropy")
    sums = resampled({**{m: scores.metrics[m] for m in both}, "tokens": scores.counts})
    return interval((sums["cross_entropy"] - sums["teacher_cross_entropy"]) / sums["tokens"])


def gap_recovered(initial: Scores, student: Scores) -> Interval:
    """Reduction of the initial forward KL to the teacher, percent; 100 equals the teacher.

    Negative if the student is farther from the teacher than it started.
    """
    both = paired(initial, student, "forward_kl")
    if not (both["a"] > 0).all():
        raise DataError(
            "The student as initialised must differ from its teacher for a gap to be recovered, "
            "but its forward KL is 0. Compare the divergences themselves."
        )
    return interval(100 * (1 - both["b"] / both["a"]))


def columns(scores: Scores) -> dict[str, Float64[np.ndarray, " documents"]]:
    """All sums of the scores, one column each."""
    bins = {f"bin_{i}": scores.calibration[:, i] for i in range(scores.calibration.shape[1])}
    return {**scores.metrics, **bins, "tokens": scores.counts, "bytes": scores.bytes}


def paired(a: Scores, b: Scores, metric: str) -> Sums:
    """Sums of one metric under both, over the same resampled documents."""
    require_same_tokens((a, b))
    return resampled({"a": a.metrics[metric], "b": b.metrics[metric], "tokens": a.counts})


def require_same_tokens(scores: Sequence[Scores]) -> None:
    """Refuse scores that are not all of the same documents, cut the same way."""
    a = scores[0]
    for b in scores:
        if not (np.array_equal(a.documents, b.documents) and np.array_equal(a.counts, b.counts)):
            raise DataError(
                f"Models must be measured on the same tokens to be compared, got {a.num_tokens} "
                f"tokens of {len(a.documents)} documents and {b.num_tokens} of "
                f"{len(b.documents)}. Measure all with the same data and rows."
            )


def over_seeds(
    scores: Sequence[Scores], metric: str, less: Sequence[Scores] = ()
) -> dict[str, Any]:
    """Mean of a metric over the seeds of one student, or of its difference from another's.

    The interval covers documents and seeds: each resample of the documents, the same for all, is
    moved by the standard error over seeds, drawn from Student's t with one degree less than seeds.
    Two seeds therefore determine little.

    Args:
        scores: One for each seed.
        less: Of the other student, with the same seeds.

    Returns:
        value, low, high; and `each`, the figure of every seed.
    """
    require_same_tokens([*scores, *less])
    table = {f"{i}": each.metrics[metric] for i, each in enumerate(scores)}
    if less:
        pairs = zip(table.items(), less, strict=True)
        table = {name: own - other.metrics[metric] for (name, own), other in pairs}
    sums = resampled({**table, "tokens": scores[0].counts})
    values = np.stack([sums[name] / sums["tokens"] for name in table])
    mean, count = values.mean(axis=0), len(values)
    if count > 1:
        generator = np.random.Generator(np.random.Philox(1))  # that of the resamples is 0
        error = values[:, 0].std(ddof=1) / math.sqrt(count)
        mean[1:] += error * generator.standard_t(count - 1, RESAMPLES)
    return {**interval(mean), "each": values[:, 0].tolist()}


def resampled(table: Mapping[str, Float64[np.ndarray, " documents"]], seed: int = 0) -> Sums:
    """Sums of each column: over all documents first, then over each resample of them.

    A resample's sums are scaled to the number of documents.
    """
    values = np.stack(list(table.values()), axis=1)
    num_documents = len(values)
    size = num_drawn(num_documents)
    generator = np.random.Generator(np.random.Philox(seed))
    sums = np.empty((RESAMPLES + 1, len(table)))
    sums[0] = values.sum(axis=0)
    for i in range(1, RESAMPLES + 1):
        drawn = generator.integers(num_documents, size=size)
        sums[i] = np.bincount(drawn, minlength=num_documents) @ values * (num_documents / size)
    return {name: sums[:, i] for i, name in enumerate(table)}


def num_drawn(documents: int) -> int:
    """Documents of a resample, so that the interval of a mean is as wide as Student's t makes it.

    Resamples of n out of n documents have (n - 1) / n of the variance that the documents show, and
    percentiles take that variance as known. Drawing m = (n - 1) (z / t)^2 of them corrects both:
    17 of 20, 6 of 9. Below five documents that would be less than one, and intervals stay too
    narrow.

    Example:
        >>> [num_drawn(n) for n in (1, 5, 9, 20, 1000)]
        [1, 2, 6, 17, 997]
    """
    if documents < 2:
        return documents
    z = NormalDist().inv_cdf(0.5 + INTERVAL_PERCENT / 200)
    ratio = student_t(z, documents - 1) / z
    return max(1, round((documents - 1) / ratio**2))


def student_t(z: float, freedom: int) -> float:
    """The quantile of Student's t at a normal quantile (Abramowitz and Stegun, 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


def interval(figure: Float64[np.ndarray, " resamples"]) -> Interval:
    """The value, which is the first entry, and the percentiles of the resamples."""
    tail = (100 - INTERVAL_PERCENT) / 2
    low, high = np.percentile(figure[1:], [tail, 100 - tail])
    return {"value": float(figure[0]), "low": float(low), "high": float(high)}


def ratio(above: str, below: str) -> Figure:
    """One column's sum over another's."""
    return lambda sums: sums[above] / sums[below]


def bits_per_byte(sums: Sums) -> Float64[np.ndarray, " resamples"]:
    """Cross-entropy in bits over the bytes of the text that was scored."""
    return sums["cross_entropy"] / (math.log(2) * sums["bytes"])


def over_confidence(sums: Sums) -> Float64[np.ndarray, " resamples"]:
    """Mean probability of the student's top token minus its accuracy; positive: over-confident."""
    return (sums["student_confidence"] - sums["student_hit"]) / sums["tokens"]


def expected_calibration_error(sums: Sums) -> Float64[np.ndarray, " resamples"]:
    """Mean over bins, weighted by tokens, of |accuracy - confidence| (Guo et al., 2017).

    Resamples use the sign of each bin on the whole sample. With signs of their own they would count
    noise as error, and the interval would lie above the value.
    """
    gaps = np.stack([column for name, column in sums.items() if name.startswith("bin_")])
    total: Float64[np.ndarray, " resamples"] = np.sign(gaps[:, 0]) @ gaps / sums["tokens"]
    return total.clip(min=0.0)
