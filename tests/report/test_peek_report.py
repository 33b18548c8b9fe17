from limbeck.evaluate.peek import peek
from limbeck.report.peek_report import peek_page
from tests.evaluate.word_tokenizer import Words
from tests.models.tiny import tiny_llama
from tests.report.test_run_report import HOSTILE, assert_fetches_and_runs_nothing


def page(student: bool = True, word: str = "w7") -> str:
    words = Words()
    words.words[7] = word
    models = tiny_llama(2, 32, seed=1), tiny_llama(2, 32, seed=2)
    text = f"w5 {word} w3"
    seen = peek(words, models[0], models[1] if student else None, text, [2.0, 4.0], top=96)
    return peek_page(seen.to_plain(), teacher=HOSTILE, student=HOSTILE if student else None)


def test_the_page_fetches_and_runs_nothing_whatever_models_and_tokens_are_called() -> None:
    hostile = HOSTILE.replace(" ", "")
    for told in (page(word=hostile), page(student=False, word=hostile)):
        assert_fetches_and_runs_nothing(told)
        assert "<script" not in told.lower()
        assert "&lt;script&gt;" in told


def test_every_position_and_temperature_has_its_place() -> None:
    told = page()
    assert told.count("<article") == 3
    assert told.count(">T = 4<") == 3
    assert told.count('class="bar teacher"') == told.count('class="bar student"') == 3 * 96 * 3


def test_without_a_student_the_page_mentions_none() -> None:
    told = page(student=False)
    assert "bar student" not in told
    assert "The student would write" not in told
