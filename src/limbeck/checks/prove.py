"""All checks, in an order in which an early failure explains later ones."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.checks.case import Case, view
from limbeck.checks.micro_batches import micro_batches_add_up
from limbeck.checks.models import (
    documents_proof,
    head_proof,
    padded_rows_proof,
    vocabulary_proof,
)
from limbeck.checks.objective import finite_differences, fused_against_plain, zero_at_equality
from limbeck.checks.proof import Finding, Proof, Unproven
from limbeck.checks.text import models_differ, teacher_reads_better
from limbeck.distributed import gathered
from limbeck.teachers import CrossTokenizerTeacher


def prove(case: Case) -> Iterator[Finding]:
    """Check every statement on the loaded weights and the user's text, one after another.

    Sharded models are gathered while their parts are called. The check of micro-batches runs whole
    forward and backward passes, which gather by themselves, as in training; reading a state dict
    ends the gathering.
    """
    batch = case.sample()
    with gathered(case.distiller), gathered(case.teacher_model):
        yield vocabulary_proof(case)
        for who, model in case.models:
            yield head_proof(who, model, batch)
            yield documents_proof(who, model, batch)
            yield padded_rows_proof(who, model, batch)
        views = view(case, batch)
        yield zero_at_equality(case, views)
        yield fused_against_plain(case, views)
        yield finite_differences(case, views)
    yield micro_batches_add_up(case, batch, views.student.hidden.dtype)
    yield models_differ(case)
    with gathered(case.distiller), gathered(case.teacher_model):
        yield teacher_reads_better(case)


def prove_unlike(case: Case, teacher: CrossTokenizerTeacher) -> Iterator[Finding]:
    """The statements that can be checked of models with two tokenizers."""
    batch = case.sample()
    reading = teacher.reread(batch)
    texts = {"student": batch, "teacher": reading.batch.to(case.device)}
    with gathered(case.distiller), gathered(case.teacher_model):
        for who, model in case.models:
            yield head_proof(who, model, texts[who])
            yield documents_proof(who, model, texts[who])
        yield padded_rows_proof("student", case.student, batch)
    num_scored, num_common = int(batch.num_scored()), len(reading.positions)
    yield Proof(
        "both tokenizers stand at one byte",
        num_common > 0,
        f"at {num_common:,} of {num_scored:,} sampled positions; coverage by class is in the notes",
        "there the teacher is compared with the student; the other positions learn from the text",
    )
    yield micro_batches_add_up(case, batch, case.student.computed_in)
    yield Unproven(
        "the divergence's zero and its gradient",
        "they are checked on the models' own logits, which two vocabularies do not share",
    )
