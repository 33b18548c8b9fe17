"""A hash names everything that decides how text becomes ids, and nothing else."""

from limbeck.tokenizers import template_hash, tokenizer_hash
from limbeck.tokenizers.identity import template_difference
from tests.tokenizers.small import CHATML, MARKED, small


def test_calls_that_set_truncation_and_padding_leave_the_hash_alone() -> None:
    tokenizer = small()
    before = tokenizer_hash(tokenizer)
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before


def test_an_added_token_changes_the_hash() -> None:
    assert tokenizer_hash(small(added=["<|x|>"])) != tokenizer_hash(small())


def test_the_template_has_a_hash_of_its_own() -> None:
    hashes = {template_hash(small(template=t)) for t in (None, CHATML, MARKED)}
    assert len(hashes) == 3
    assert tokenizer_hash(small(template=CHATML)) == tokenizer_hash(small())


def test_templates_that_render_alike_do_not_differ() -> None:
    assert template_difference(small(template=CHATML), small(template=MARKED)) is None


def test_one_template_alone_is_a_difference() -> None:
    told = template_difference(small(), small(template=CHATML))
    assert told == "The student has no chat template and the other model has one."


def test_a_template_that_cannot_render_is_shown_as_such() -> None:
    broken = small(template="{{ raise_exception('no chats') }}")
    told = template_difference(broken, small(template=CHATML))
    assert told is not None
    assert "cannot be rendered: no chats" in told
