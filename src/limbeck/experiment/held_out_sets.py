"""Figures of a run on each of several held-out texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from limbeck.config import RunConfig
from limbeck.data import held_out_configs
from limbeck.data.mixture import NAME
from limbeck.evaluate.scores import Scores
from limbeck.experiment.results import compare
from limbeck.experiment.score_files import TrialScores
from limbeck.registry import Problem

SHOWN = ("held_out", "trials", "gap_recovered_percent", "difference")
"""Results that are kept of each text."""


def set_problems(run: RunConfig) -> Iterator[Problem]:
    """Mistakes in names of held-out texts, in the one that chooses, and in how they are read."""
    config = run.evaluate
    streamed = any(text.streaming for text in held_out_configs(run).values())
    if streamed and config.max_documents is None:
        yield Problem(
            "evaluate.max_documents",
            "must say how many rows are read of held-out text that is streamed as `data` is, and "
            "does not. Set it.",
        )
    names = [] if config.data is None or isinstance(config.data, str) else list(config.data)
    if config.data == {}:
        yield Problem("evaluate.data", "must name held-out text, or be null, got {}.")
    for name in names:
        if not NAME.fullmatch(name):
            yield Problem(
                "evaluate.data",
                f"names must be letters, digits, '.', '-' or '_', got {name!r}. Call it something "
                "else.",
            )
    if config.choose_by is not None and config.choose_by not in names:
        yield Problem(
            "evaluate.choose_by",
            f"must be one of the held-out texts that evaluate.data names "
            f"({', '.join(names) or 'none has a name'}), got {config.choose_by!r}.",
        )


def by_set(names: Iterable[str], scores: Mapping[str, TrialScores]) -> dict[str, Any]:
    """Results on the test documents of each held-out text; nothing where there is one.

    Args:
        names: Of the held-out texts, the one that chooses first.
        scores: By trial.
    """
    first, *others = names or [""]
    if not others:
        return {}
    found: dict[str, dict[str, Scores]] = {name: {} for name in (first, *others)}
    for trial, each in scores.items():
        for name, figures in {first: each.test, **each.others}.items():
            if figures is not None and name in found:
                found[name][trial] = figures
    compared = {name: compare(figures) for name, figures in found.items() if figures}
    return {
        "sets": {n: {k: v for k, v in c.items() if k in SHOWN} for n, c in compared.items()},
        "chosen_by_set": first,
    }
