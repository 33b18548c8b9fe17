"""`limbeck chat`: answers, the teacher's view of them, and its commands."""

import io
import json
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from limbeck.commands.chat import chat
from limbeck.commands.chat_window import ChatWindow
from limbeck.commands.conversation import ChatSession, ScoredAnswer, Settings
from limbeck.errors import ConfigError, Stopped
from limbeck.models import save_student
from limbeck.rollouts import sample, seed_of
from tests.models.tiny import tiny_llama
from tests.tokenizers.small import CHATML, small

SETTINGS = Settings(temperature=1.0, top_p=1.0, tokens=6, seed=3)


@pytest.fixture
def talk() -> ChatSession:
    tokenizer = small(template=CHATML)
    models = {
        name: tiny_llama(2, 32, vocabulary=len(tokenizer), seed=seed)
        for seed, name in enumerate(("student", "teacher"))
    }
    return ChatSession(models, tokenizer, SETTINGS)


def ignore(name: str, text: str) -> None:
    """Streams into nothing."""


def rendered(talk: ChatSession, messages: list[dict[str, str]]) -> list[int]:
    return talk._tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_an_answer_is_a_sample_and_the_teacher_scores_each_of_its_tokens(talk):
    asked = [{"role": "user", "content": "the cat"}]
    prompt = rendered(talk, asked)
    (wanted,) = sample(talk._models["student"], [prompt], SETTINGS.sampling, [seed_of((3, 0))])
    answers = talk.answer("the cat", ignore)
    student, teacher = answers["student"], answers["teacher"]
    assert student.text == talk._tokenizer.decode(wanted.token_ids, skip_special_tokens=True)
    ids = torch.tensor([[*prompt, *wanted.token_ids]])
    logp = talk._models["teacher"].logits(ids)[0].log_softmax(-1).detach()
    by_hand = [-float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(wanted.token_ids)]
    nats = [value for _, value in student.tokens]
    assert nats == pytest.approx(by_hand[: len(nats)], abs=1e-4)
    assert all(value is None for _, value in teacher.tokens)
    assert talk.messages == [*asked, {"role": "assistant", "content": student.text}]


def test_what_is_streamed_grows_to_the_answer(talk):
    heard: dict[str, list[str]] = {"student": [], "teacher": []}
    answers = talk.answer("the cat", lambda name, text: heard[name].append(text))
    for name, texts in heard.items():
        assert texts[-1] == answers[name].text
        assert len(texts) > 1
        assert texts == sorted(texts, key=len)


def test_a_retry_replaces_the_last_answer_by_another(talk):
    with pytest.raises(ConfigError, match="/retry answers the last message again"):
        talk.retry(ignore)
    first = talk.answer("the cat", ignore)["student"].text
    second = talk.retry(ignore)["student"].text
    assert first != second
    assert [m["content"] for m in talk.messages] == ["the cat", second]


def test_temperature_zero_takes_the_most_probable_token_for_every_seed(talk):
    texts = set()
    for seed in range(3):
        talk.settings = Settings(temperature=0.0, tokens=5, seed=seed)
        talk.begin(None)
        texts.add(talk.answer("the cat", ignore)["student"].text)
    assert len(texts) == 1


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(talk):
    talk.answer("the cat", ignore)
    before = list(talk.messages)

    def interrupt(name: str, text: str) -> None:
        raise Stopped("Stopped by SIGINT.", 2)

    with pytest.raises(Stopped):
        talk.answer("and then", interrupt)
    assert talk.messages == before


def test_a_conversation_longer_than_the_models_read_is_refused(talk):
    with pytest.raises(ConfigError, match=r"must be shorter than the \d+ tokens .*/clear starts"):
        talk.answer("the cat " * 2000, ignore)
    assert talk.messages == []


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("temperature", "warm", "/temperature must be a number from 0, got 'warm'"),
        ("temperature", "inf", "/temperature must be a number from 0, got 'inf'"),
        ("temperature", "nan", "/temperature must be a number from 0, got 'nan'"),
        ("top-p", "1.5", "/top-p must be a number from 0 to 1, got '1.5'"),
        ("tokens", "0", "/tokens must be a whole number from 1, got '0'"),
        ("tokens", "2.5", "/tokens must be a whole number from 1, got '2.5'"),
    ],
)
def test_wrong_settings_are_refused(name, value, told):
    with pytest.raises(ConfigError, match=told):
        SETTINGS.changed(name, value)


def run(tmp_path: Path, lines: list[str], *, template: str | None = CHATML) -> str:
    tokenizer = small(template=template) if template else small()
    for seed, name in enumerate(("runs/x/student", "teacher")):
        model = tiny_llama(2, 32, vocabulary=len(tokenizer), seed=seed)
        save_student(model, tokenizer, tmp_path / name)
    app = typer.Typer()
    app.command()(chat)
    words = [str(tmp_path / "runs/x"), str(tmp_path / "teacher"), "--tokens", "4"]
    result = CliRunner().invoke(app, words, input="\n".join(lines), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_lines_that_are_piped_in_are_answered_and_saved_as_chat_data(tmp_path):
    file = tmp_path / "chats.jsonl"
    lines = ["/system Be brief", "the cat", "/nothing", "/tokens 0", "/temperature 0", "/retry"]
    shown = run(tmp_path, [*lines, f"/save {file}", "/quit", "never read"])
    for words in (
        "There is no command /nothing. /help lists all of them.",
        "/tokens must be a whole number from 1, got '0'",
        "temperature 0, top-p 0.95, 4 tokens",
        "teacher's mean -log p",
    ):
        assert words in " ".join(shown.split())
    (row,) = map(json.loads, file.read_text().splitlines())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]


def test_a_model_without_a_chat_template_continues_the_message(tmp_path):
    shown = run(tmp_path, ["the cat"], template=None)
    assert "no chat template: each message is continued as plain text" in " ".join(shown.split())


@pytest.mark.parametrize(("width", "rows"), [(120, 1), (60, 2)])
def test_answers_stand_side_by_side_where_there_is_room(width, rows):
    answer = ScoredAnswer(
        "a cat\x1b[2J", (("a cat\x1b[2J", 4.0),), is_cut=True, tokens_per_second=2.0
    )
    console = Console(file=io.StringIO(), width=width)
    window = ChatWindow(console, {"student": "s", "teacher": "t"})
    window.show({"student": answer, "teacher": answer})
    drawn = console.file.getvalue()
    assert len([line for line in drawn.splitlines() if "a cat" in line]) == rows
    assert "\x1b" not in drawn
    assert "cut at the longest answer" in " ".join(drawn.split())
