"""Equal vocabularies are proven id by id; everything else is refused or noted."""

from typing import Any

import pytest

from limbeck.errors import ConfigError
from limbeck.tokenizers import VocabularyProof, prove_same_vocabulary, tokenizer_hash
from tests.tokenizers.small import BEGIN, CHATML, edited, small


def prove(student: Any, teacher: Any, rows: tuple[int, int] = (512, 512)) -> VocabularyProof:
    return prove_same_vocabulary(student, teacher, student_rows=rows[0], teacher_rows=rows[1])


def swap_two_tokens(tree: dict[str, Any]) -> None:
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def test_the_same_tokenizer_gives_its_own_size_and_no_notes() -> None:
    tokenizer = small()
    size = max(tokenizer.get_vocab().values()) + 1
    assert prove(tokenizer, small()) == VocabularyProof(size, same_tokenizer=True, notes=())


@pytest.mark.parametrize("rows", [(320, 384), (384, 320), (384, 384), (320, 320)])
def test_padded_heads_of_any_size_are_cut_to_the_largest_real_id(rows: tuple[int, int]) -> None:
    assert prove(small(), small(), rows).size == 320


@pytest.mark.parametrize(("rows", "who"), [((319, 320), "student"), ((320, 319), "teacher")])
def test_too_few_rows_are_refused_by_name(rows: tuple[int, int], who: str) -> None:
    with pytest.raises(ConfigError, match=rf"The {who} must have a row .* 320 .* has 319") as info:
        prove(small(), small(), rows)
    assert info.value.exit_code == 2


def test_the_same_size_with_other_ids_is_refused_with_the_ids() -> None:
    student = edited(swap_two_tokens)
    a, b = (small().convert_tokens_to_ids(token) for token in "ab")
    with pytest.raises(ConfigError, match="2 of 320 do not") as info:
        prove(student, small())
    assert f"  {a}: student 'b', teacher 'a'" in str(info.value)
    assert f"  {b}: student 'a', teacher 'b'" in str(info.value)


def test_only_the_first_five_differing_ids_are_listed() -> None:
    def rotate(tree: dict[str, Any]) -> None:
        vocabulary = tree["model"]["vocab"]
        letters = "abcdefghij"
        ids = [vocabulary[letter] for letter in letters]
        vocabulary.update(zip(letters, ids[1:] + ids[:1], strict=True))

    with pytest.raises(ConfigError, match="10 of 320") as info:
        prove(edited(rotate), small())
    assert str(info.value).count("  student") == 0
    assert str(info.value).count(": student ") == 5


def test_other_merges_with_the_same_ids_are_a_note() -> None:
    def reverse(tree: dict[str, Any]) -> None:
        tree["model"]["merges"].reverse()

    student = edited(reverse)
    assert tokenizer_hash(student) != tokenizer_hash(small())
    proof = prove(student, small())
    assert not proof.same_tokenizer
    assert proof.size == 320
    assert "model.merges" in proof.notes[0]


def test_another_normaliser_is_a_note() -> None:
    def lowercase(tree: dict[str, Any]) -> None:
        tree["normalizer"] = {"type": "Lowercase"}

    proof = prove(edited(lowercase), small())
    assert not proof.same_tokenizer
    assert "normalizer" in proof.notes[0]


@pytest.mark.parametrize("teacher_has_more", [True, False])
def test_shared_ids_end_where_one_model_has_no_token(teacher_has_more: bool) -> None:
    less, more = small(), small(added=["<|tool|>", "<|image|>"])
    proof = prove(less, more) if teacher_has_more else prove(more, less)
    who = "teacher" if teacher_has_more else "student"
    assert proof.size == 320
    assert f"Only the {who} knows the 2 ids from 320 on ('<|tool|>', '<|image|>')" in proof.notes[0]


def test_a_hole_among_the_shared_ids_is_refused() -> None:
    def drop(tree: dict[str, Any]) -> None:
        merges = tree["model"]["merges"]
        token = "".join(merges.pop())
        del tree["model"]["vocab"][token]
        tree["model"]["vocab"]["<last>"] = 320

    with pytest.raises(ConfigError, match="319: student nothing, teacher"):
        prove(edited(drop), small(added=["<last>"]))


def test_different_end_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'<\|begin\|>' \(1\), the teacher's '<\|end\|>' \(0\)"):
        prove(small(end=BEGIN), small())


def test_one_end_token_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="must end a text with the same token"):
        prove(small(end=None), small())


def test_different_beginnings_are_a_note() -> None:
    notes = prove(small(begin=BEGIN), small()).notes
    assert any("begin a text differently" in note for note in notes)


def test_different_templates_are_a_note_with_the_difference() -> None:
    notes = prove(small(template=CHATML), small(template=CHATML.replace("\n", " "))).notes
    assert len(notes) == 1
    assert "-<|turn|>user What is 2 + 2?" in notes[0]
    assert "+<|turn|>user\n" in notes[0]


def test_a_padding_token_in_one_tokenizer_only_is_accepted() -> None:
    assert prove(small(pad=None), small()).size == 320
