"""Checks and notes about the text: which model predicts it better, and which tokens are trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from limbeck.batch import Batch
from limbeck.checks.case import POSITIONS, Case, shortened
from limbeck.checks.proof import Proof
from limbeck.config import HeadBudget
from limbeck.config.schedules import largest
from limbeck.data import spread
from limbeck.data.source import Rows
from limbeck.distributed import whole
from limbeck.losses import Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.models import CausalLM, PreTrainedTokenizerBase, evaluating, plain_weights

ROWS = 8
"""Rows on which both models are measured."""

WORSE = 0.05
"""Nats a token by which a teacher must be worse for a run to be refused."""

SHOWN = 160
"""Tokens of the example row that are printed."""


class Excerpt(NamedTuple):
    """Consecutive tokens of a row, as text."""

    text: str
    scored: bool


def teacher_reads_better(case: Case) -> Proof:
    """The teacher predicts the user's text better than the student does.

    A warning if not; a failure where the student's advantage is large and certain, the teacher
    counts in the objective, and `evaluate.allow_worse_teacher` is not set.
    """
    rows = case.data.batch(spread(case.data.num_rows, ROWS))
    batch = shortened(rows, POSITIONS).to(case.device)
    budget = case.distiller.objective.head_budget_mb
    counts = batch.scored.sum(1)
    chosen = [i for i in range(len(batch)) if counts[i]]
    by_row = [
        [cross_entropy(model, batch.part(slice(i, i + 1)), budget) for i in chosen]
        for _, model in case.models
    ]
    weights = (counts[chosen] / counts.sum()).double().cpu()
    nats = torch.tensor(by_row, dtype=torch.float64)
    teacher, student = (nats @ weights).tolist()
    uses_teacher = largest(case.recipe.divergence_weight) > 0 or bool(case.recipe.extra)
    guess = math.log(case.vocabulary.size)
    return Proof(
        "teacher reads the text better",
        teacher < student,
        f"cross-entropy {teacher:.3f} against the student's {student:.3f} nats a token on "
        f"{int(batch.num_scored()):,} tokens; a uniform guess has {guess:.2f}",
        "the teacher can improve this student on this text"
        if teacher < student
        else "a better student may get worse: check the teacher, its template and "
        "the text, train with alpha: 0, or set evaluate.allow_worse_teacher=true",
        decides=uses_teacher
        and not case.allow_worse_teacher
        and is_worse((nats[0] - nats[1]).tolist()),
    )


def quantized_reads_as_well(case: Case, unquantized: CausalLM, data: Rows) -> Proof:
    """A quantised teacher predicts a text as well as before; a warning if it does not.

    Args:
        unquantized: The teacher before it was quantised, on any device; it is cut to the shared
            vocabulary.
        data: Held-out text where there is some.
    """
    batch = shortened(data.batch(spread(data.num_rows, ROWS)), POSITIONS)
    budget = case.distiller.objective.head_budget_mb
    unquantized.vocabulary_size = case.teacher_model.vocabulary_size
    before, after = (
        cross_entropy(model, batch.to(model.device), budget)
        for model in (unquantized, case.teacher_model)
    )
    return Proof(
        "quantised teacher reads as before",
        after - before < WORSE,
        f"perplexity {math.exp(before):.3f} before and {math.exp(after):.3f} after "
        f"({after - before:+.4f} nats a token) on {int(batch.num_scored()):,} tokens",
        "the student learns from the quantised teacher: this is what rounding its weights costs",
        decides=False,
    )


def is_worse(differences: Sequence[float]) -> bool:
    """Whether the mean over rows is at least `WORSE` nats and twice its standard error above 0."""
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) > max(WORSE, 2 * error)


def cross_entropy(model: CausalLM, batch: Batch, head_budget_mb: HeadBudget = "auto") -> float:
    """Mean negative log-likelihood of the scored tokens, nats."""
    objective = Objective([WeightedTerm("hard", 1.0, CrossEntropyTerm())], head_budget_mb)
    with torch.no_grad(), evaluating(model):
        hidden, _ = model(batch)
        student = StudentView(hidden, model.head, {}, batch.targets())
        loss, _ = objective(student, TeacherSignal(), batch.num_scored())
    return float(loss)


def models_differ(case: Case) -> Proof:
    """The student's weights are not the teacher's; a warning if they are."""
    teacher, student = (plain_weights(model) for _, model in case.models)
    same = teacher.keys() == student.keys() and all(
        weight.shape == student[name].shape
        and bool((whole(weight) == whole(student[name]).to(weight.dtype)).all())
        for name, weight in teacher.items()
    )
    sizes = [f"{who} {model.num_parameters:,} parameters" for who, model in case.models]
    return Proof(
        "student differs from the teacher",
        not same,
        ("the same weights, " if same else "other weights, ") + ", ".join(sizes),
        "the student already equals its teacher: only the cross-entropy (alpha < 1) can change it"
        if same
        else "training starts from another function than the teacher's",
        decides=False,
    )


def trained_on(tokenizer: PreTrainedTokenizerBase, batch: Batch) -> list[Excerpt]:
    """The start of a batch's first row as text, split into trained and untrained tokens.

    A token is trained if the position before it is scored; a document's first token never is.
    """
    tokens: list[tuple[int, bool]] = []
    columns = (batch.input_ids, batch.target_ids, batch.scored, batch.position_ids)
    real = batch.document_ids[0] >= 0
    for read, target, scored, place in zip(*(c[0, real].tolist() for c in columns), strict=True):
        if place == 0:
            tokens.append((read, False))
        tokens.append((target, scored))
    return [
        Excerpt(str(tokenizer.decode([token for token, _ in run])), scored)
        for scored, run in groupby(tokens[:SHOWN], key=lambda pair: pair[1])
    ]


def text_notes(
    tokenizer: PreTrainedTokenizerBase, batches: Iterable[Batch], *, template: str | None
) -> list[str]:
    """Notes about templates and special tokens.

    Args:
        template: Which chat template writes conversations; None for text without any.
    """
    first, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = ends = scored = unscored = 0
    for batch in batches:
        ids = batch.input_ids
        if first is not None:
            twice = (ids[:, :-1] == first) & (ids[:, 1:] == first)
            doubled += int((twice & (batch.position_ids[:, :-1] == 0)).sum())
        if end is not None:
            ends += int((batch.targets() == end).sum())
        scored += int(batch.num_scored())
        unscored += int((~batch.scored & (batch.document_ids >= 0)).sum())
    notes = []
    if template is not None:
        notes.append(
            f"Conversations are written with {template}; of the sample's {scored + unscored:,} "
            f"tokens, {scored:,} are trained."
        )
    if doubled:
        notes.append(
            f"{doubled} sampled texts start with the BOS token twice: the text or the chat "
            "template adds its own. Remove it from the text."
        )
    if end is not None and scored and not ends:
        notes.append(
            f"None of the {scored:,} sampled trained tokens is the EOS token, so the student "
            "may not learn to stop. Possible reasons: texts longer than the sample, append_eos: "
            "false, or a template that ends a turn with another token."
        )
    return notes
