"""Metrics of a step's rollouts, and warnings when they degenerate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

NGRAM = 4
"""Tokens of the n-grams whose repetition is counted."""
WINDOW = 8
"""Steps that are averaged before they are compared."""
LONGER = 2.0
MORE_REPEATED = 0.2
MIN_ENDED = 0.2
"""Share of ended rollouts in the first steps, below which a decrease is not reported."""


def figures_of(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of a step's rollouts.

    Returns:
        rollout_length: Mean number of written tokens.
        rollout_ended: Share that ended with an end token.
        rollout_entropy: Minus the mean log-probability of the written tokens under their writer,
            nats; at sampling temperature 1 and top_p 1 an unbiased estimate of its entropy.
        rollout_repeated: Share of the 4-grams that stood earlier in the same rollout.
    """
    texts = [rollout["token_ids"] for rollout in rollouts]
    num_tokens = sum(map(len, texts))
    ngrams = [[tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)] for text in texts]
    num_ngrams = sum(map(len, ngrams))
    repeated = num_ngrams - sum(len(set(each)) for each in ngrams)
    return {
        "rollout_length": num_tokens / len(texts),
        "rollout_ended": fmean(rollout["finish"] == "end" for rollout in rollouts),
        "rollout_entropy": -sum(sum(rollout["logprobs"]) for rollout in rollouts) / num_tokens,
        "rollout_repeated": repeated / max(num_ngrams, 1),
    }


class Watch:
    """Compares the last steps with the first ones, which are read from the run's files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._figures: dict[int, dict[str, float]] = {}
        self._warned: set[str] = set()

    def warnings(self, step: int, figures: Mapping[str, float]) -> list[str]:
        """Warnings about degradation since the first steps, each given once.

        Args:
            step: Counted from 0; those before it may have run in an earlier process.
        """
        self._figures[step] = dict(figures)
        if step >= 2 * WINDOW:
            self._figures.pop(step - WINDOW, None)
        if step < 2 * WINDOW - 1:
            return []
        first = self._mean(range(WINDOW))
        recent = self._mean(range(step - WINDOW + 1, step + 1))
        if not first or not recent:
            return []
        found = [(kind, text) for kind, text in problems(first, recent) if kind not in self._warned]
        self._warned.update(kind for kind, _ in found)
        return [text for _, text in found]

    def _mean(self, steps: Iterable[int]) -> dict[str, float]:
        """Means over some steps; empty where a file is missing."""
        each = [self._at(step) for step in steps]
        if not all(each):
            return {}
        return {name: fmean(figures[name] for figures in each) for name in each[0]}

    def _at(self, step: int) -> dict[str, float]:
        path = self._folder / f"step-{step}.jsonl"
        if step not in self._figures and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            self._figures[step] = figures_of([json.loads(line) for line in lines])
        return self._figures.get(step, {})


def problems(first: Mapping[str, float], recent: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    """Signs that a student has stopped ending its texts, or repeats itself: kind and message."""
    remedy = "Read the last files in rollouts/, and consider a lower optim.learning_rate"
    length, before = recent["rollout_length"], first["rollout_length"]
    ended, once = recent["rollout_ended"], first["rollout_ended"]
    if length > LONGER * before or (once >= MIN_ENDED and ended < once / 2):
        yield (
            "length",
            f"rollouts grow: {length:.0f} tokens, {ended:.0%} ended, over the last {WINDOW} steps; "
            f"{before:.0f} and {once:.0%} in the first {WINDOW}. {remedy}, a smaller "
            "rollout.share or objective.divergence=forward_kl.",
        )
    repeated, old = recent["rollout_repeated"], first["rollout_repeated"]
    if repeated > old + MORE_REPEATED:
        yield (
            "repetition",
            f"rollouts repeat themselves: {repeated:.0%} of {NGRAM}-grams stood there before, "
            f"over the last {WINDOW} steps; {old:.0%} in the first {WINDOW}. {remedy} or a smaller "
            "rollout.share.",
        )
