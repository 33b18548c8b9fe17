"""What is said of the text: who reads it better, what is learnt, which tokens are odd."""

import dataclasses
import math

import pytest
import torch

from limbeck.batch import Batch
from limbeck.checks import text_notes, trained_on
from limbeck.checks.case import POSITIONS, shortened, uneven
from limbeck.checks.text import (
    cross_entropy,
    is_worse,
    quantized_reads_as_well,
    teacher_reads_better,
)
from tests.checks.cases import tiny_case
from tests.models.tiny import random_batch, tiny_model
from tests.tokenizers.small import BEGIN, small


def row_of(ids: list[int], scored: list[bool]) -> Batch:
    return Batch.from_tokens(torch.tensor([ids]), torch.tensor([scored]))


def test_cross_entropy_is_that_of_the_whole_model():
    model, batch = tiny_model("llama"), random_batch(4, 30)
    found = cross_entropy(model, batch)
    with torch.no_grad():
        logits = model.hf_model(input_ids=batch.input_ids).logits[batch.scored]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets())
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_the_text_check_compares_the_cross_entropies_of_both_models():
    case = tiny_case(teacher=tiny_model("llama", 2, seed=3, initializer_range=0.02))
    assert teacher_reads_better(case).holds == (guess(case, 0) < guess(case, 1))
    backwards = tiny_case(
        teacher=case.student, student=tiny_model("llama", 2, seed=3, initializer_range=0.02)
    )
    assert teacher_reads_better(backwards).holds != teacher_reads_better(case).holds
    assert f"{math.log(96):.2f}" in teacher_reads_better(case).found


@pytest.mark.parametrize(
    ("differences", "worse"),
    [
        ([0.06, 0.06, 0.06], True),
        ([0.04, 0.04, 0.04], False),  # certain and small
        ([2.0, -1.0, 0.5, -0.5], False),  # large and uncertain
        ([2.0, 1.0, 1.5, 1.2], True),
        ([5.0], False),
        ([-1.0, -1.1], False),
    ],
)
def test_a_teacher_is_called_worse_if_the_difference_is_large_and_certain(differences, worse):
    assert is_worse(differences) is worse


def test_a_student_that_predicts_much_better_is_refused_unless_allowed():
    noisy = tiny_model("llama", 3, seed=1, initializer_range=1.0)
    calm = tiny_model("llama", 3, seed=3, initializer_range=0.02)

    def proof(teacher, student, *, allowed=False, **objective):
        case = tiny_case(teacher=teacher, student=student, **objective)
        return teacher_reads_better(dataclasses.replace(case, allow_worse_teacher=allowed))

    assert proof(noisy, calm).fails
    assert not proof(noisy, calm, allowed=True).holds
    assert not proof(noisy, calm, allowed=True).fails
    assert not proof(noisy, calm, alpha=0.0).fails
    assert proof(calm, noisy).holds


def test_a_quantised_teacher_is_compared_over_the_shared_vocabulary():
    case = tiny_case(teacher=tiny_model("llama", 3, seed=1), vocabulary=90)
    padded = tiny_model("llama", 3, seed=1)
    proof = quantized_reads_as_well(case, padded, case.data)
    assert "(+0.0000 nats a token)" in proof.found


def guess(case, which):
    return cross_entropy(case.models[which][1], case.data.batch(range(6)))


def test_scored_tokens_are_marked_and_the_whole_text_is_shown():
    tokenizer = small()
    ids = tokenizer("the cat sat on the mat").input_ids
    learnt = [i % 4 >= 2 for i in range(len(ids) - 1)]
    segments = trained_on(tokenizer, row_of(ids, learnt))
    assert "".join(s.text for s in segments) == tokenizer.decode(ids)
    assert segments[0].scored is False
    assert [s.scored for s in segments] == [i % 2 == 1 for i in range(len(segments))]
    position = 1 + learnt.index(True)
    assert tokenizer.decode(ids[:position]) == segments[0].text


def test_texts_in_one_row_are_shown_whole_and_padding_is_not():
    tokenizer = small()
    first, second = tokenizer("a cat").input_ids, tokenizer("the mat").input_ids
    ids = [*first[:-1], *second[:-1], 0, 0]
    targets = [*first[1:], *second[1:], 0, 0]
    places = [*range(len(first) - 1), *range(len(second) - 1), 0, 1]
    documents = [0] * (len(first) - 1) + [1] * (len(second) - 1) + [-1, -1]
    as_row = [torch.tensor([each]) for each in (ids, targets, places, documents)]
    batch = Batch(as_row[0], as_row[1], as_row[3] >= 0, as_row[2], as_row[3])
    told = "".join(segment.text for segment in trained_on(tokenizer, batch))
    assert told == "a catthe mat"


def test_a_doubled_bos_and_a_missing_end_token_are_reported():
    tokenizer = small(begin=BEGIN)
    first, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert first is not None
    assert end not in (None, first)
    scored = [True] * 3
    doubled = text_notes(tokenizer, [row_of([first, first, 5, 6], scored)], template=None)
    assert "twice" in doubled[0]
    assert "learn to stop" in doubled[1]
    assert text_notes(tokenizer, [row_of([first, 5, 6, end], scored)], template=None) == []


def test_a_chat_shows_its_template_and_the_number_of_scored_tokens():
    tokenizer = small()
    ids = [5, 6, 7, tokenizer.eos_token_id]
    notes = text_notes(tokenizer, [row_of(ids, [False, True, True])], template="this template")
    assert len(notes) == 1
    assert "3 tokens, 2 are trained" in notes[0]


def test_long_prompts_are_not_cut_before_the_scored_tokens():
    scored = torch.zeros(2, 400, dtype=torch.bool)
    scored[0, 300:] = True
    scored[1, 5:] = True
    batch = Batch.from_tokens(torch.zeros(2, 401, dtype=torch.long), scored)
    assert shortened(batch, POSITIONS).scored.any(1).all()
    counts = uneven(batch).scored.sum(1).tolist()
    assert counts == [100, 198]
