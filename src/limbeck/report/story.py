"""The results of a run in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from limbeck.report.run_files import Evaluation, Figure, ModelSize
from limbeck.report.words import THIN, count, interval, number, percent, whole_percent

NOTHING = ModelSize()
FEWEST = 5
"""Documents below which the intervals of `limbeck.evaluate.scores` are narrower than they say."""


def headline(evaluation: Evaluation | None) -> str:
    """The one sentence a reader takes away."""
    if evaluation is None or not evaluation.trials:
        return "A student was distilled; no text was held out, so what it kept is not known."
    gap = evaluation.gap_recovered_percent.get("distilled")
    closed = "A student was distilled from its teacher"
    if gap is not None and math.isfinite(gap.value):
        closed = gap_closed(gap)
    cost = ", and ".join(costs(evaluation))
    return f"{closed}, {cost}." if cost else f"{closed}."


def gap_closed(gap: Figure) -> str:
    """How the distance to the teacher changed."""
    if gap.value < 0:
        grew = interval(-gap, whole_percent)
        return f"The student ended {grew} farther from its teacher than it began"
    closed = interval(gap, whole_percent)
    return f"The student closed {closed} of the gap between its start and its teacher"


def costs(evaluation: Evaluation) -> Iterator[str]:
    """How much smaller and faster the student is, as far as known."""
    teacher, student = (evaluation.models.get(m, NOTHING) for m in ("teacher", "student"))
    if student.parameters and teacher.parameters:
        kept = number(100 * student.parameters / teacher.parameters, 0)
        yield f"with {count(student.parameters)} parameters, {kept}{THIN}% of the teacher's"
    if speed := ratio(student.tokens_per_second, teacher.tokens_per_second):
        yield f"reads text {number(speed, 2)} times as fast"


def ratio(above: float | None, below: float | None) -> float | None:
    """One figure over another, where both are known and not 0."""
    return above / below if above and below else None


def lede(evaluation: Evaluation | None) -> list[str]:
    """The sentences below the headline."""
    if evaluation is None or not evaluation.trials:
        return ["Give evaluate.data some held-out text to measure it against its teacher."]
    return [
        *agreement(evaluation),
        *against_baseline(evaluation),
        *against_control(evaluation),
        *with_seeds(evaluation),
        *caution(evaluation),
    ]


def agreement(evaluation: Evaluation) -> Iterator[str]:
    """How often both models would write the same token."""
    trials = evaluation.trials
    after = trials.get("distilled", {}).get("top1_agreement")
    before = trials.get("initial", {}).get("top1_agreement")
    if after is not None:
        was = "" if before is None else f" ({percent(before.value, 0)} before training)"
        yield (
            f"On held-out text its first choice is the teacher's at {percent(after.value, 0)} of "
            f"the tokens{was}."
        )


def against_baseline(evaluation: Evaluation) -> Iterator[str]:
    """The student beside the one that was trained with cross-entropy only."""
    difference = evaluation.difference.get("forward_kl")
    baseline = evaluation.gap_recovered_percent.get("cross_entropy")
    if baseline is not None:
        closed = interval(baseline, whole_percent)
        yield f"Trained with cross-entropy only, on the same tokens, it closed {closed}."
    if difference is None or difference.low is None or difference.high is None:
        return
    least = min(abs(difference.low), abs(difference.high))
    digits = 6 if difference.low * difference.high > 0 and least < 0.0005 else 3
    distance = -difference if difference.high < 0 else difference
    by = interval(distance, partial(number, digits=digits))
    if difference.low > 0:
        yield f"The teacher brought it {by} nats a token nearer."
    elif difference.high < 0:
        yield f"The teacher's distributions made it worse, by {by} nats a token."
    else:
        yield f"This much held-out text cannot tell the two apart: {by} nats a token."


def against_control(evaluation: Evaluation) -> Iterator[str]:
    """The student beside those of the controls."""
    farther = evaluation.control.get("shuffled")
    if farther is not None and farther.low is not None and farther.low > 0:
        yield (
            "What helped is what the teacher says of this text: with its distributions of other "
            f"rows the student ended {interval(farther)} nats a token farther away."
        )
    longer = evaluation.control.get("equal_time")
    if longer is not None and longer.low is not None and longer.high is not None:
        alone = "a student trained on the text alone for as much time"
        if longer.low <= 0 <= longer.high:
            by = interval(longer)
            yield f"This much held-out text cannot tell it from {alone}: {by} nats a token."
            return
        by = interval(longer if longer.low > 0 else -longer)
        where = "farther from" if longer.low > 0 else "nearer to"
        yield f"A{alone[1:]} ended {by} nats a token {where} the teacher."


def with_seeds(evaluation: Evaluation) -> Iterator[str]:
    """The difference from the baseline over several seeds."""
    nearer = evaluation.seeds.difference.get("forward_kl")
    if nearer is None or nearer.low is None or nearer.high is None:
        return
    begin = f"Over {len(evaluation.seeds.seeds)} seeds"
    if nearer.low <= 0 <= nearer.high:
        yield f"{begin} whether the teacher helps is not decided: {interval(nearer)} nats a token."
        return
    verb = "brings it" if nearer.low > 0 else "takes it"
    where = "nearer" if nearer.low > 0 else "farther away"
    by = interval(nearer if nearer.low > 0 else -nearer)
    yield f"{begin} the teacher {verb} {by} nats a token {where}; this interval covers the seeds."


def caution(evaluation: Evaluation) -> Iterator[str]:
    """A warning if the intervals rest on few documents."""
    documents = evaluation.held_out.get("documents")
    if documents is not None and documents < 20:
        how = "too narrow" if documents < FEWEST else "rough"
        yield (
            f"Only {documents} held-out document{'' if documents == 1 else 's'} stand behind these "
            f"figures, so their intervals are {how}."
        )


def bounds(teacher: Mapping[str, Any]) -> Iterator[str]:
    """What divergences are where only the top k of the teacher's tokens are known."""
    form = (teacher.get("recorded") or {}).get("form", {}).get("type")
    if form == "top_k" or "k" in (teacher.get("served") or {}):
        yield (
            "Only the teacher's top k is known, so divergences are lower bounds of those from its "
            "whole distribution."
        )


def training(facts: Mapping[str, Any]) -> Iterator[str]:
    """How much of the student was trained, where that was not all of it."""
    trained, whole = facts.get("parameters"), facts.get("of")
    if not isinstance(trained, int) or not isinstance(whole, int) or trained >= whole:
        return
    how = "in adapters, merged into it afterwards" if "lora" in facts else "and the rest was frozen"
    yield f"{trained:,} of {whole:,} parameters were trained ({percent(trained / whole)}), {how}."


def layers_kept(facts: Mapping[str, Any]) -> list[int]:
    """The teacher's layers a student was made of, wherever its facts tell them."""
    found = facts.get("layers_kept")
    if isinstance(found, list) and all(isinstance(layer, int) for layer in found):
        return found
    inner = [value for value in facts.values() if isinstance(value, Mapping)]
    return next((kept for value in inner if (kept := layers_kept(value))), [])
