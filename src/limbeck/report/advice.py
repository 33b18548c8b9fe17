"""What to do next, each sentence with the measurements it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from limbeck.report.run_files import Evaluation, Figure, is_number
from limbeck.report.words import interval, number, percent

LATE = 0.75
"""Share of the steps after which a fall of the held-out divergence counts as late."""
STILL_FALLING = 0.03
"""Fall since then, relative to the divergence there, above which more tokens are advised."""
ROSE = 0.03
"""Rise since the best evaluation, relative to it, above which fewer steps are advised."""
OVER_CONFIDENT = 0.02
"""Over-confidence whose interval must lie above this to be called so."""
OWN_TEXT = 1.25
"""How many times as far from its teacher as on held-out text a student may be on its own."""


def advice(evaluation: Evaluation | None, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """All advice that the measurements of a run support, the most important first.

    Args:
        metrics: Lines of metrics.jsonl.
    """
    found = (
        []
        if evaluation is None
        else [
            *worse_teacher(evaluation),
            *control_helped(evaluation),
            *extra_helped(evaluation),
            *text_or_teacher(evaluation),
        ]
    )
    found += progress(metrics)
    if evaluation is not None:
        found += [*confidence(evaluation), *own_text(evaluation), *tasks_kept(evaluation)]
    return found


def worse_teacher(evaluation: Evaluation) -> Iterator[str]:
    """Stop, if the teacher predicts this text worse than the student before training."""
    before = evaluation.teacher_advantage.get("initial")
    if before is not None and before.high is not None and before.high < 0:
        yield (
            "Stop, and use another teacher or other text: before training the student predicted "
            f"the held-out text better than its teacher, by {interval(-before)} nats a token, so "
            "coming nearer to this teacher makes it worse."
        )
        return
    after = evaluation.teacher_advantage.get("distilled")
    if after is not None and after.high is not None and after.high < 0:
        yield (
            "More distillation on this text has little to give: the student now predicts it "
            f"better than its teacher, by {interval(-after)} nats a token. A lower objective.alpha "
            "follows the text, a better teacher would help more."
        )


def control_helped(evaluation: Evaluation) -> Iterator[str]:
    """A shuffled teacher that did as well: the gain has another cause than the teacher."""
    farther = evaluation.control.get("shuffled")
    if farther is None or farther.low is None or farther.high is None or farther.low > 0:
        return
    begin = (
        "Do not credit the teacher yet: with its distributions of other rows in the place of the "
        "right ones the student's forward KL is "
    )
    if farther.high < 0:
        yield (
            f"{begin}lower by {interval(-farther)} nats a token. Check that text and teacher "
            "belong together."
        )
        return
    yield (
        f"{begin}not distinguishable from the student's own: {interval(farther)} nats a token "
        "higher. Train on more tokens, check that text and teacher belong together, or measure on "
        "more held-out text."
    )


def extra_helped(evaluation: Evaluation) -> Iterator[str]:
    """Drop the extra terms where the student without them is as near, or nearer."""
    farther = evaluation.control.get("without_extra")
    if farther is None or farther.low is None or farther.high is None or farther.low > 0:
        return
    if farther.high < 0:
        yield (
            "Drop objective.extra: without its terms the student's forward KL is lower by "
            f"{interval(-farther)} nats a token."
        )
        return
    yield (
        "Drop objective.extra, or measure on more held-out text: without its terms the student's "
        f"forward KL is not distinguishable, {interval(farther)} nats a token higher."
    )


def text_or_teacher(evaluation: Evaluation) -> Iterator[str]:
    """A lower alpha where training on the text alone predicts the text better."""
    difference = evaluation.difference.get("cross_entropy")
    if difference is not None and difference.high is not None and difference.high < 0:
        yield (
            "If the text matters more than the teacher, lower objective.alpha: trained with "
            "cross-entropy only, the student predicts the held-out text better, by "
            f"{interval(-difference)} nats a token."
        )


def progress(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """More tokens while the divergence still falls at the end; fewer where it has risen."""
    points = [
        (int(line["step"]), float(line["forward_kl"]))
        for line in metrics
        if line.get("kind") == "evaluation" and "step" in line and is_number(line.get("forward_kl"))
    ]
    if len(points) < 3:
        return
    last_step, last = points[-1]
    best_step, best = min(points, key=lambda point: point[1])
    if last > (1 + ROSE) * best:
        yield (
            f"Train for fewer steps: the held-out forward KL was lowest at step {best_step:,}, "
            f"{number(best)} nats, and is {number(last)} at step {last_step:,}. More text, or a "
            "lower optim.learning_rate, may help too."
        )
        return
    early = [point for point in points if point[0] <= LATE * last_step] or points[:1]
    step, then = early[-1]
    if last < (1 - STILL_FALLING) * then:
        yield (
            f"Train on more tokens: between steps {step:,} and {last_step:,} the held-out forward "
            f"KL still fell from {number(then)} to {number(last)} nats, by "
            f"{percent(1 - last / then, 0)}."
        )


def confidence(evaluation: Evaluation) -> Iterator[str]:
    """Where the student is surer than it is right: alpha, in the direction of the baseline."""
    trials = evaluation.trials
    figure = trials.get("distilled", {}).get("over_confidence")
    if figure is None or figure.low is None or figure.low <= OVER_CONFIDENT:
        return
    found = (
        "The student is over-confident: its first choice has more probability than it is right, by "
        f"{interval(figure, percent)}"
    )
    alone = trials.get("cross_entropy", {}).get("over_confidence")
    if alone is None:
        yield (
            f"{found}. A run with evaluate.baseline: cross_entropy shows whether the text or the "
            "teacher causes it."
        )
        return
    found += f" (trained with cross-entropy only: {percent(alone.value)})"
    if alone.value > figure.value:
        yield f"{found}. The text causes it: raise objective.alpha."
        return
    yield (
        f"{found}. The teacher causes it, or the form it was recorded in: lower objective.alpha, "
        "or record samples if the store has only a top k."
    )


def own_text(evaluation: Evaluation) -> Iterator[str]:
    """Rollouts, where the student is farther from its teacher on text of its own."""
    suite = evaluation.suites.generation.get("distilled")
    own = None if suite is None else suite.student.get("forward_kl")
    held_out = evaluation.trials.get("distilled", {}).get("forward_kl")
    if not isinstance(own, Figure) or own.low is None or held_out is None or held_out.high is None:
        return
    if own.low > OWN_TEXT * held_out.high:
        yield (
            "Train on text that the student writes (rollout, from: student): on its own samples "
            f"its forward KL is {interval(own)} nats a token, on held-out text "
            f"{interval(held_out)}."
        )


def tasks_kept(evaluation: Evaluation) -> Iterator[str]:
    """Other tasks, where the teacher itself does no better than guessing."""
    for row in evaluation.suites.tasks.rows:
        if row.metric == "acc" and "teacher" in row.models and "distilled" not in row.retained:
            yield (
                f"The task {row.task} cannot say what was kept: its teacher scores "
                f"{percent(row.models['teacher'].value)} on {row.items:,} items, and guessing "
                f"{percent(row.floor)}. Use more items or another task."
            )
