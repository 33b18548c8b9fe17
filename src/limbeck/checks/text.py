"""Checks and notes about the text: which model predicts it better, and which tokens are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import torch

from limbeck.batch import Batch
from limbeck.checks.case import POSITIONS, Case, shortened, spread
from limbeck.checks.proof import Proof
from limbeck.config import HeadBudget
from limbeck.distributed import whole
from limbeck.losses import Objective, StudentView, TeacherSignal, WeightedTerm
from limbeck.losses.terms.cross_entropy import CrossEntropyTerm
from limbeck.models import CausalLM, PreTrainedTokenizerBase, evaluating, plain_weights

ROWS = 8
"""Rows on which both models are measured."""

SHOWN = 160
"""Tokens of the example row that are printed."""


class Excerpt(NamedTuple):
    """Consecutive tokens of a row, as text."""

    text: str
    scored: bool


def teacher_reads_better(case: Case) -> Proof:
    """The teacher predicts the user's text better than the student does; a warning if not."""
    rows = case.data.batch(spread(case.data.num_rows, ROWS))
    batch = shortened(rows, POSITIONS).to(case.device)
    budget = case.distiller.objective.head_budget_mb
    teacher, student = (cross_entropy(model, batch, budget) for _, model in case.models)
    guess = math.log(case.vocabulary.size)
    return Proof(
        "teacher reads the text better",
        teacher < student,
        f"cross-entropy {teacher:.3f} against the student's {student:.3f} nats a token on "
        f"{int(batch.num_scored()):,} tokens; a uniform guess has {guess:.2f}",
        "the teacher can improve this student on this text"
        if teacher < student
        else "a better student may get worse: check the teacher, its template and "
        "the text, or train with alpha: 0",
        decides=False,
    )


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
    tokenizer: PreTrainedTokenizerBase, batches: Iterable[Batch], *, is_chat: bool
) -> list[str]:
    """Notes about templates and special tokens."""
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
    if is_chat:
        notes.append(
            "Conversations are written with the teacher's chat template, for the student too; of "
            f"the sample's {scored + unscored:,} tokens, {scored:,} are trained."
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
