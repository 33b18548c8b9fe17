"""Every piece of advice on both sides of its threshold."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.report.advice import advice
from limbeck.report.run_files import (
    Evaluation,
    Figure,
    GenerationFigures,
    SeedFigure,
    SeedFigures,
    SuiteFigures,
    TaskFigures,
    TaskRow,
)
from limbeck.report.story import lede


def figure(value: float, spread: float) -> Figure:
    return Figure(value, value - spread, value + spread)


def steps(*divergences: float) -> list[dict[str, Any]]:
    """Evaluations every ten steps."""
    return [
        {"kind": "evaluation", "step": 10 * i, "forward_kl": value}
        for i, value in enumerate(divergences, 1)
    ]


def only(found: list[str], *words: str) -> bool:
    """Whether there is one sentence, and it has these words."""
    return len(found) == 1 and all(word in found[0].replace("\u202f", " ") for word in words)


@pytest.mark.parametrize(("value", "given"), [(-0.2, True), (-0.05, False), (0.3, False)])
def test_a_run_with_a_worse_teacher_is_stopped(value: float, given: bool) -> None:
    found = advice(Evaluation(teacher_advantage={"initial": figure(value, 0.1)}), [])
    assert only(found, "Stop", "0.200 [0.100, 0.300]") if given else not found


@pytest.mark.parametrize(("value", "given"), [(-0.2, True), (-0.05, False)])
def test_another_teacher_is_advised_if_the_student_predicts_better(
    value: float, given: bool
) -> None:
    evaluation = Evaluation(
        teacher_advantage={"initial": figure(1.0, 0.1), "distilled": figure(value, 0.1)}
    )
    found = advice(evaluation, [])
    assert only(found, "little to give", "0.200 [0.100, 0.300]") if given else not found


@pytest.mark.parametrize(("value", "given"), [(-0.2, True), (0.05, True), (0.2, False)])
def test_a_shuffled_teacher_that_does_as_well_is_named(value: float, given: bool) -> None:
    evaluation = Evaluation(control={"shuffled": figure(value, 0.1)}, trials={"distilled": {}})
    found = advice(evaluation, [])
    how = "lower by 0.200 [0.100, 0.300]" if value < -0.1 else "not distinguishable"
    assert only(found, "Do not credit the teacher", how) if given else not found
    helped = [line for line in lede(evaluation) if "What helped" in line]
    assert helped == [] if given else only(helped, "0.200 [0.100, 0.300] nats")


@pytest.mark.parametrize(("value", "given"), [(-0.2, True), (0.05, True), (0.2, False)])
def test_extra_terms_that_do_not_help_are_dropped(value: float, given: bool) -> None:
    found = advice(Evaluation(control={"without_extra": figure(value, 0.1)}), [])
    how = "lower by 0.200 [0.100, 0.300]" if value < -0.1 else "not distinguishable"
    assert only(found, "Drop objective.extra", how) if given else not found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.2, "the teacher brings it 0.200 [0.100, 0.300] nats a token nearer"),
        (-0.2, "the teacher takes it 0.200 [0.100, 0.300] nats a token farther away"),
        (0.05, "is not decided: 0.050"),
    ],
)
def test_several_seeds_are_told_with_an_interval_of_their_own(value: float, words: str) -> None:
    nearer = SeedFigure(value, value - 0.1, value + 0.1, (value,) * 3)
    found = SeedFigures((0, 1, 2), difference={"forward_kl": nearer})
    told = lede(Evaluation(seeds=found, trials={"distilled": {}}))
    assert only(told, "Over 3 seeds", words)


@pytest.mark.parametrize(("value", "given"), [(-0.2, True), (-0.05, False), (0.2, False)])
def test_a_lower_alpha_is_advised_if_the_baseline_predicts_the_text_better(
    value: float, given: bool
) -> None:
    found = advice(Evaluation(difference={"cross_entropy": figure(value, 0.1)}), [])
    assert only(found, "lower objective.alpha", "0.200 [0.100, 0.300]") if given else not found


@pytest.mark.parametrize(
    ("divergences", "words"),
    [
        ((3.0, 2.0, 1.5, 1.4), ("more tokens", "steps 30 and 40", "from 1.500 to 1.400", "7 %")),
        ((3.0, 2.0, 1.5, 1.46), ()),  # 2.7 % less
        ((3.0, 1.4, 1.5, 1.45), ("fewer steps", "lowest at step 20, 1.400", "is 1.450 at")),
        ((3.0, 1.42, 1.5, 1.45), ()),  # 2.1 % above the lowest, 3.3 % below the late one
        ((3.0, 1.0), ()),
        ((), ()),
    ],
)
def test_more_or_fewer_tokens_are_advised_by_the_end_of_the_curve(
    divergences: tuple[float, ...], words: tuple[str, ...]
) -> None:
    unmeasured = {"kind": "evaluation", "step": 25, "forward_kl": None}  # it was not finite
    found = advice(None, [unmeasured, *steps(*divergences)])
    assert only(found, *words) if words else not [s for s in found if "fewer" in s]
    if divergences == (3.0, 1.42, 1.5, 1.45):
        assert only(found, "more tokens", "3 %")
    elif not words:
        assert not found


@pytest.mark.parametrize(("value", "given"), [(0.05, True), (0.025, False), (-0.2, False)])
def test_alpha_or_samples_are_advised_for_an_over_confident_student(
    value: float, given: bool
) -> None:
    trials = {"distilled": {"over_confidence": figure(value, 0.01)}}
    found = advice(Evaluation(trials=trials), [])
    words = ("over-confident", "5.0 % [4.0 %, 6.0 %]")
    assert only(found, *words, "evaluate.baseline") if given else not found
    for alone, does in ((0.08, "raise objective.alpha"), (0.01, "lower objective.alpha")):
        both = trials | {"cross_entropy": {"over_confidence": figure(alone, 0.01)}}
        found = advice(Evaluation(trials=both), [])
        told = (*words, f"cross-entropy only: {alone:.1%}".replace("%", " %"), does)
        assert only(found, *told) if given else not found


@pytest.mark.parametrize(("value", "given"), [(1.5, True), (1.3, False), (0.5, False)])
def test_rollouts_are_advised_if_kl_is_larger_on_the_students_own_text(
    value: float, given: bool
) -> None:
    own = GenerationFigures(student={"forward_kl": figure(value, 0.05)})
    evaluation = Evaluation(
        trials={"distilled": {"forward_kl": figure(1.0, 0.05)}},
        suites=SuiteFigures(generation={"distilled": own}),
    )
    found = advice(evaluation, [])
    assert only(found, "rollout", "1.500 [1.450, 1.550]", "1.000") if given else not found


@pytest.mark.parametrize("retained", [{}, {"distilled": figure(0.5, 0.1)}])
def test_another_task_is_advised_if_the_teacher_is_at_chance(retained: dict[str, Figure]) -> None:
    row = TaskRow("quiz", "acc", 40, 0.25, {"teacher": figure(0.275, 0.1)}, retained)
    found = advice(Evaluation(suites=SuiteFigures(tasks=TaskFigures("0", (row,)))), [])
    assert not found if retained else only(found, "quiz", "27.5 %", "40 items", "25.0 %")
