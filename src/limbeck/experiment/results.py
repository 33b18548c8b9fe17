"""Results of a run: metrics of all trials side by side, examples, sizes and speeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.config import RunConfig
from limbeck.data import spread
from limbeck.data.held_out import HeldOut
from limbeck.evaluate.examples import continuations, disagreements
from limbeck.evaluate.scores import (
    Scores,
    breakdown,
    gap_recovered,
    paired_difference,
    summarise,
    teacher_advantage,
)
from limbeck.evaluate.speed import speeds
from limbeck.evaluate.suites import Suite, SuiteContext, suites
from limbeck.experiment.parts import Parts
from limbeck.models import CausalLM, shape_facts
from limbeck.registry import type_of
from limbeck.rollouts import Prompts
from limbeck.teachers import DISTRIBUTION, LocalTeacher

METRICS = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "acceptance",
    "top1_agreement",
    "top5_agreement",
    "cross_entropy",
    "perplexity",
    "bits_per_byte",
)
NUM_DISAGREEMENTS = 8
SEARCHED_ROWS = 16
"""Test rows in which disagreements are searched: all of them would cost one more pass each."""
PROMPT_TOKENS = 24
"""Of a text that is continued; other data have prompts of their own."""
LONGEST_PROMPT = 512
CONTINUED_TOKENS = 48


def compare(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Metrics of every trial with intervals, the gap each closed, and their paired difference.

    Args:
        scores: By trial: `initial`, `distilled`, and `cross_entropy` where there is one, all
            measured on the same tokens.
    """
    if not scores:
        return {"metrics": list(METRICS), "trials": {}}
    trials = {name: summarise(s) for name, s in scores.items()}
    some = next(iter(scores.values()))
    found: dict[str, Any] = {
        "metrics": list(METRICS),
        "trials": trials,
        "padded_mass": {name: s.padded_mass for name, s in scores.items()},
        "held_out": {"documents": len(some.documents), "tokens": some.num_tokens},
    }
    found["groups"] = {
        name: breakdown(scores[name]) for name in ("distilled", "cross_entropy") if name in scores
    }
    if "teacher_cross_entropy" in some.metrics:
        found["trials"]["teacher"] = teacher_figures(some)
        found["teacher_advantage"] = {name: teacher_advantage(s) for name, s in scores.items()}
    # A copy of the teacher has no gap to close.
    if "initial" in scores and (scores["initial"].metrics["forward_kl"] > 0).all():
        found["gap_recovered_percent"] = {
            name: gap_recovered(scores["initial"], s)
            for name, s in scores.items()
            if name != "initial"
        }
    if "cross_entropy" in scores and "distilled" in scores:
        found["difference"] = {
            metric: paired_difference(scores["cross_entropy"], scores["distilled"], metric)
            for metric in ("forward_kl", "total_variation", "top1_agreement", "cross_entropy")
            if metric in some.metrics
        }
    controls = {"shuffled", "equal_time", "without_extra"} & scores.keys()
    if controls and "distilled" in scores:
        found["control"] = {
            name: paired_difference(scores[name], scores["distilled"], "forward_kl")
            for name in sorted(controls)
        }
    return found


def teacher_figures(scores: Scores) -> dict[str, Any]:
    """The teacher's own figures: its distance to itself is zero, its cross-entropy is not."""
    exact = {"value": 0.0, "low": 0.0, "high": 0.0}
    own = Scores(
        metrics={**scores.metrics, "cross_entropy": scores.metrics["teacher_cross_entropy"]},
        counts=scores.counts,
        bytes=scores.bytes,
        calibration=scores.calibration,
        documents=scores.documents,
    )
    figures = summarise(own)
    shown = {name: figures[name] for name in ("cross_entropy", "perplexity", "bits_per_byte")}
    same = {"value": 1.0, "low": 1.0, "high": 1.0}
    distances = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
    agreements = ("acceptance", "top1_agreement", "top5_agreement")
    return {**dict.fromkeys(distances, exact), **dict.fromkeys(agreements, same), **shown}


def make_suites(config: RunConfig, context: SuiteContext) -> dict[str, Suite]:
    """The recipe's further suites; every rank calls it, before training.

    Raises:
        ConfigError: One cannot measure this recipe.
    """
    bound = {
        type_of(spec): suites.bind(spec, f"evaluate.suites[{index}]")
        for index, spec in enumerate(config.evaluate.suites)
    }
    return {name: make(context) for name, make in bound.items()}


def places(
    parts: Parts,
    teacher: LocalTeacher,
    held_out: HeldOut,
    students: Mapping[str, CausalLM],
    num_continuations: int,
) -> dict[str, Any]:
    """Examples, sizes and speeds for the report. One process only.

    Sizes and speeds are those of both models in the teacher's data type: a float32 student beside a
    bfloat16 teacher would compare data types. The student of `students` is converted for that.
    """
    student = students["distilled"]
    prompts = Prompts(
        held_out.data,
        longest=LONGEST_PROMPT,
        first_tokens=PROMPT_TOKENS,
        documents=held_out.test_documents,
    )
    shown = {
        "disagreements": disagreements(
            student,
            teacher.with_needs(DISTRIBUTION),
            parts.tokenizer,
            held_out.data,
            [held_out.test_rows[i] for i in spread(len(held_out.test_rows), SEARCHED_ROWS)],
            count=NUM_DISAGREEMENTS,
            head_budget_mb=parts.config.memory.head_budget_mb,
        ),
        "continuations": continuations(
            {"teacher": teacher.model, **students},
            parts.tokenizer,
            prompts,
            count=num_continuations,
            max_new_tokens=CONTINUED_TOKENS,
        ),
    }
    both = {"teacher": teacher.model, "student": student.to(teacher.model.hf_model.dtype)}
    per_second = speeds(both)
    models = {
        name: {**shape_facts(model), "tokens_per_second": per_second[name]}
        for name, model in both.items()
    }
    return {**shown, "models": models}
