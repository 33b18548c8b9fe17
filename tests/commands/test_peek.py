import io
import json
import re
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from limbeck.commands.opening import open_models
from limbeck.commands.peek import parse_temperatures, peek
from limbeck.commands.peek_picture import show
from limbeck.errors import ConfigError
from limbeck.evaluate.peek import Peek
from limbeck.evaluate.peek import peek as look_at
from limbeck.models import save_student
from tests.evaluate.word_tokenizer import Words
from tests.models.tiny import tiny_llama
from tests.tokenizers.small import small

TEXT = "the cat"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root, tokenizer = tmp_path_factory.mktemp("models"), small()
    for seed, name in enumerate(("teacher", "student")):
        model = tiny_llama(2 - seed, 32, vocabulary=len(tokenizer) + 8 * seed, seed=seed)
        save_student(model, tokenizer, root / name)
    return [str(root / "teacher"), str(root / "student")]


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(peek)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def seen(student: bool = True, text: str = "w5 w17 w3", word: str = "w17") -> Peek:
    words = Words()
    words.words[17] = word
    models = tiny_llama(2, 32, seed=1), tiny_llama(2, 32, seed=2)
    return look_at(words, models[0], models[1] if student else None, text, [2.0, 4.0])


def drawn(told: Peek, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show(told, ["teacher", "student"], Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_teacher_and_a_text_are_enough(models: list[str]) -> None:
    told = run(models[0], TEXT)
    assert "Dark knowledge" in told
    assert "entropy" in told
    assert "student" not in told.replace("a student", "")


def test_two_models_of_unlike_padding_are_cut_to_what_they_share(models: list[str]) -> None:
    told = json.loads(run(*models, TEXT, "--json", "--top", "3", "--temperatures", "2"))
    assert told["temperatures"] == [1.0, 2.0]
    for position in told["positions"]:
        assert 3 <= len(position["candidates"]) <= 4
        assert all(kl > 0 for kl in position["forward_kl"])
        assert position["student_first"]


def test_the_page_is_written_beside_the_terminals_picture(
    models: list[str], tmp_path: Path
) -> None:
    told = run(*models, TEXT, "--html", str(tmp_path / "peek.html"))
    assert "Written:" in told
    page = (tmp_path / "peek.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "bar student" in page


@pytest.mark.parametrize("words", [["one"], ["one", "two", "three", "four"]])
def test_the_wrong_number_of_words_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"got {len(words)} words?\."):
        peek(words)


@pytest.mark.parametrize("told", ["", "1,", "0", "-1", "nan", "inf", "hot", "1;2"])
def test_invalid_temperatures_are_refused(told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(told))):
        parse_temperatures(told)


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("student", [True, False])
def test_nothing_is_wider_than_the_terminal_or_cut_off(width: int, student: bool) -> None:
    told = drawn(seen(student), width)
    assert max(map(len, told.splitlines())) <= width
    assert "…" not in told


def test_each_column_names_what_its_full_bar_stands_for() -> None:
    line = next(line for line in drawn(seen(), 120).splitlines() if "full = " in line)
    scales = [float(each) for each in re.findall(r"full = ([\d.]+)", line)]
    assert len(scales) == 3
    assert scales == sorted(scales, reverse=True)


def test_bars_grow_flatter_as_the_temperature_rises() -> None:
    lines = [line for line in drawn(seen(student=False), 120).splitlines() if "%" in line]
    last = lines[5]  # the fifth of the first position's tokens, below the heading
    widths = [len(bar) for bar in re.findall(r"[▏▎▍▌▋▊▉█]+", last)]
    assert len(widths) == 3
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_the_token_that_followed_is_marked_once_a_position() -> None:
    marked = [line for line in drawn(seen()).splitlines() if line.startswith("▸")]
    assert [line.split()[1] for line in marked] == ["·w17", "·w3"]


def test_an_output_without_unicode_gets_ascii_characters() -> None:
    told = drawn(seen(), encoding="ascii")
    assert "> .w17" in told
    assert "###" in told
    assert "?" not in told.replace("> ?", "")


def test_output_that_is_no_terminal_has_no_colours() -> None:
    assert "\x1b" not in drawn(seen())


def test_tokens_cannot_send_terminal_or_markup_codes() -> None:
    word = "\x1b[31m[bold]\u202e"
    told = drawn(seen(text=f"w5 {word} w3", word=word), 160)
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "\\x1b[31m[bold]\\u202e" in told


def test_code_of_an_unpinned_commit_is_refused_before_a_tokenizer_could_run_it(monkeypatch) -> None:
    monkeypatch.setattr("limbeck.models.load.load_tokenizer", None)
    with pytest.raises(ConfigError, match="40-digit commit"):
        open_models(["someone/model"], [], trust_remote_code=True, device="cpu")
