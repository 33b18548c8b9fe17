"""Outcomes that two vocabularies share."""

import numpy as np
import pytest

from limbeck.tokenizers import Aligner, Coverage, TokenBytes, add_coverage, classes_of
from limbeck.tokenizers.coverage import CLASSES
from limbeck.tokenizers.outcomes import shared_outcomes
from tests.tokenizers.assorted import corpus, tokenizers
from tests.tokenizers.small import small

NAMES = ["bpe", "small bpe", "digits", "unigram", "llama 2"]


def sides(student, teacher):
    return TokenBytes(tokenizers()[student], "student"), TokenBytes(
        tokenizers()[teacher], "teacher"
    )


def counted(student, teacher, texts=None, first_scored=1):
    """Coverage of texts, trained on from one token on."""
    pair = sides(student, teacher)
    outcomes, aligner, coverage = shared_outcomes(*pair), Aligner(*pair), Coverage()
    classes = classes_of(pair[0]), classes_of(pair[1])
    for text in texts or corpus():
        ids = tokenizers()[student](text, add_special_tokens=False)["input_ids"]
        (found,) = aligner.align([ids])
        scored = np.arange(len(ids)) >= first_scored
        add_coverage(coverage, np.array(ids), scored, found, outcomes, classes)
    return coverage


@pytest.mark.parametrize("name", NAMES)
def test_equal_vocabularies_have_an_outcome_for_each_token(name):
    found = shared_outcomes(*sides(name, name))
    assert np.array_equal(found.student, found.teacher)
    assert sorted(found.student) == list(range(found.num_outcomes))
    assert found.student_exact.all()
    assert found.teacher_exact.all()


@pytest.mark.parametrize("student", NAMES)
@pytest.mark.parametrize("teacher", NAMES)
def test_an_outcome_is_a_shared_token_that_begins_each_of_its_tokens(student, teacher):
    pair = sides(student, teacher)
    found = shared_outcomes(*pair)
    root = {}
    for side, of, exact in zip(
        pair,
        (found.student, found.teacher),
        (found.student_exact, found.teacher_exact),
        strict=True,
    ):
        for token in np.flatnonzero(exact):
            assert root.setdefault(of[token], side.bytes_of[token]) == side.bytes_of[token] or (
                token in side.special
            )
    assert len(root) == found.num_outcomes
    for side, of in zip(pair, (found.student, found.teacher), strict=True):
        for token, raw in enumerate(side.bytes_of):
            if of[token] < found.num_outcomes and token not in side.special:
                assert raw.startswith(root[of[token]])


def test_swapping_the_sides_gives_the_same_outcomes():
    ab, ba = (shared_outcomes(*sides(*names)) for names in (("bpe", "unigram"), ("unigram", "bpe")))
    assert ab.num_outcomes == ba.num_outcomes
    assert np.array_equal(ab.student, ba.teacher)
    assert np.array_equal(ab.teacher, ba.student)


def packed_numbers():
    """Tokens of several digits."""
    side = TokenBytes(tokenizers()["bpe"], "student")
    return [i for i, raw in enumerate(side.bytes_of) if raw and raw.isdigit() and len(raw) > 1]


def test_a_number_token_has_its_first_digit_as_root():
    pair = sides("bpe", "digits")
    found = shared_outcomes(*pair)
    assert packed_numbers()
    for token in packed_numbers():
        first = pair[1].bytes_of.index(pair[0].bytes_of[token][:1])
        assert found.student[token] == found.teacher[first]
        assert not found.student_exact[token]


def test_special_tokens_without_counterpart_are_in_no_outcome():
    teacher = TokenBytes(tokenizers()["bpe"], "teacher")
    student = TokenBytes(small(), "student")
    found = shared_outcomes(student, teacher)
    assert found.student[student.end] == found.teacher[teacher.end] < found.num_outcomes
    others = sorted(student.special - {student.end})
    assert others
    assert (found.student[others] == found.num_outcomes).all()


def test_coverage_of_equal_tokenizers_is_whole_in_both_directions():
    coverage = counted("bpe", "bpe")
    for counts in coverage.directions.values():
        for count in counts.values():
            assert count.tokens == count.compared == count.exact
            assert count.merged == 0
    assert coverage.uncovered() == []


def test_coverage_counts_every_token_but_the_first_in_its_class():
    coverage, pair = counted("bpe", "unigram"), sides("bpe", "unigram")
    ids = [tokenizers()["bpe"](t, add_special_tokens=False)["input_ids"][1:] for t in corpus()]
    classes = np.bincount(classes_of(pair[0])[np.concatenate(ids)], minlength=len(CLASSES))
    assert [coverage.student[name].tokens for name in CLASSES] == classes.tolist()
    for counts in coverage.directions.values():
        for count in counts.values():
            assert count.exact + count.merged <= count.compared <= count.tokens


def test_coverage_counts_the_tokens_that_are_trained_on():
    text = corpus()[0][:400]
    whole, last = counted("bpe", "digits", [text]), counted("bpe", "digits", [text], 100)
    ids = tokenizers()["bpe"](text, add_special_tokens=False)["input_ids"]
    total = {
        who: sum(count.tokens for count in counts.values())
        for who, counts in last.directions.items()
    }
    rest = tokenizers()["bpe"].decode(ids[100:])
    theirs = tokenizers()["digits"](rest, add_special_tokens=False)["input_ids"]
    assert total["student"] == len(ids) - 100
    assert abs(total["teacher"] - len(theirs)) <= 1
    assert total["teacher"] < sum(count.tokens for count in whole.teacher.values())


def test_coverage_shows_which_class_is_compared_by_roots_only():
    numbers = [tokenizers()["bpe"].decode([token]) for token in packed_numbers()]
    coverage = counted("bpe", "digits", [f"({')('.join(numbers)})" * 20])
    digits = coverage.student["digits"]
    assert digits.merged > digits.exact
    assert digits.covered == 1.0
    assert any("Most of the student's digits" in line for line in coverage.lines())
    assert coverage.uncovered() == []


def test_a_class_that_is_not_reached_is_uncovered():
    coverage = counted("bpe", "bpe")
    words = coverage.student["words"]
    words.exact = words.merged = 0
    (found,) = coverage.uncovered()
    assert found == f"words of the student (0% of {words.tokens:,} tokens)"
