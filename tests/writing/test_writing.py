"""What a teacher writes is one file however often it is interrupted, and a run reads it."""

import json
import os
import signal
from statistics import fmean

import pytest
import torch

import limbeck
from limbeck.config import DataConfig
from limbeck.data import load_text
from limbeck.errors import ConfigError, DataError, TryLaterError
from limbeck.experiment import load
from limbeck.models import ModelSource, load_model, model_facts
from limbeck.rollouts import Sampling, sample
from limbeck.tokenizers import load_tokenizer
from limbeck.writing import Writing, filters
from tests.distributed.processes import live
from tests.experiment.tiny_run import steps_of
from tests.writing.tiny_writer import ASKED, rows_of, writing_recipe, written


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def interrupted(path, after):
    """Write so many batches, and raise."""
    calls = 0

    def stop():
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt

    with Writing(load(path)) as writing, pytest.raises(KeyboardInterrupt):
        writing.write(stop)


def files(folder):
    return {
        name: (folder / name).read_bytes() for name in ("written.jsonl", "written.jsonl.provenance")
    }


def life(path, cache, after):
    """A process that kills itself after so many batches, in the middle of a line."""
    os.environ["LIMBECK_CACHE"] = cache
    calls = 0

    def die():
        nonlocal calls
        calls += 1
        if calls > after:
            with (path.parent / "written.jsonl").open("a") as file:
                file.write('{"messages": [{"role": "us')
            os.kill(os.getpid(), signal.SIGKILL)

    with Writing(load(path)) as writing:
        writing.write(die)


def test_a_file_written_with_two_kills_equals_an_uninterrupted_one(tmp_path):
    path = writing_recipe(tmp_path, per_prompt=2)
    summary = written(path)
    whole = files(tmp_path)
    assert 6 < summary.progress.kept < summary.answers == 16
    for name in whole:
        (tmp_path / name).unlink()
    for after in (1, 2):
        assert live(life, path, str(tmp_path / "cache"), after) == -signal.SIGKILL
        assert (tmp_path / "written.jsonl").read_bytes() not in (b"", whole["written.jsonl"])
    assert written(path).progress == summary.progress
    assert files(tmp_path) == whole
    assert written(path).progress == summary.progress
    assert files(tmp_path) == whole


def test_rows_beyond_the_saved_progress_are_written_again(tmp_path):
    """As when a process dies between the rows of a batch and its progress."""
    path = writing_recipe(tmp_path)
    interrupted(path, 1)
    progress = (tmp_path / "written.jsonl.provenance").read_text()
    written(path)
    whole = files(tmp_path)
    (tmp_path / "written.jsonl.provenance").write_text(progress)
    written(path)
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("write.sampling_temperature=0.7", "write.sampling_temperature: was 1.0, is 0.7"),
        ("seed=1", "seed: was 0, is 1"),
        ("write.filters=[{type: length, at_least: 3}]", "write.filters[0].at_least: was 'absent'"),
        ("data.max_documents=3", "data.max_documents: was None, is 3"),
    ],
)
def test_a_file_is_continued_with_its_own_settings_only(override, named, tmp_path):
    path = writing_recipe(tmp_path)
    interrupted(path, 1)
    before = files(tmp_path)
    with pytest.raises(ConfigError) as error:
        written(path, override)
    assert named in str(error.value)
    assert files(tmp_path) == before


def test_a_file_of_another_recipe_or_an_edited_one_is_not_changed(tmp_path):
    path, output = writing_recipe(tmp_path), tmp_path / "written.jsonl"
    output.write_text("{}\n")
    with pytest.raises(ConfigError, match="exists and was not written by limbeck write"):
        written(path)
    assert output.read_text() == "{}\n"
    output.unlink()
    interrupted(path, 1)
    changed = output.read_text().replace("assistant", "Assistant", 1)
    output.write_text(changed)
    with pytest.raises(DataError, match="was changed since"):
        written(path)
    assert output.read_text() == changed


def test_only_one_process_writes_a_file_at_a_time(tmp_path):
    path = writing_recipe(tmp_path)
    with Writing(load(path)) as first:

        def second():
            with pytest.raises(TryLaterError, match="Only one process may write"):
                written(path)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            first.write(second)


def test_a_row_says_where_it_comes_from_and_what_the_teacher_finds_of_it(tmp_path):
    path = writing_recipe(tmp_path, truncated="keep")
    summary = written(path)
    rows, tokenizer = rows_of(tmp_path / "written.jsonl"), load_tokenizer(str(tmp_path / "teacher"))
    source = ModelSource(str(tmp_path / "teacher"))
    teacher = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    asked = {
        f"prompts.jsonl:{n}": row for n, row in enumerate(rows_of(tmp_path / "prompts.jsonl"), 1)
    }
    assert summary.progress.kept == len(rows) > 4
    for row in rows:
        origin, messages = row["provenance"], row["messages"]
        assert messages[:-1] == asked[origin["prompt"]]["messages"]
        assert origin["weights_sha256"] == model_facts(source, teacher)["weights_sha256"]
        assert origin["sampling"] == {"sampling_temperature": 1.0, "top_p": 1.0}
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        ids = prompt["input_ids"]
        [again] = sample(teacher, [ids], Sampling(tokens=12), [origin["seed"]])
        assert origin["prompt_tokens"] == len(ids)
        assert origin["tokens"] == len(again.token_ids)
        assert origin["finish"] == again.finish
        assert origin["logprob"] == pytest.approx(fmean(again.logprobs), abs=1e-5)
        text = tokenizer.decode(again.token_ids, skip_special_tokens=True)
        assert messages[-1]["content"] == text.strip()
    assert len({row["provenance"]["seed"] for row in rows}) == len(rows)


def test_the_file_is_an_ordinary_runs_text(tmp_path):
    path = writing_recipe(tmp_path)
    summary = written(path)
    overrides = [
        f"data.path={summary.output}",
        "objective.alpha=0",
        "optim.steps=2",
        "evaluate={}",
        "data.type=auto",
    ]
    with limbeck.assemble(load(path, overrides)) as run:
        run.train()
        assert run.parts.data.num_documents == summary.progress.kept
    assert len(steps_of(tmp_path / "run")) == 2


ANSWER = "of old"
PROMPTS = {
    "chat": [{"messages": [{"role": "user", "content": text}]} for text in ASKED],
    "sharegpt": [{"conversations": [{"from": "human", "value": text}]} for text in ASKED],
    "alpaca": [{"instruction": text} for text in ASKED],
    "completion": [{"prompt": text} for text in ASKED],
}
ANSWERED = {
    "chat": [
        {"messages": [*row["messages"], {"role": "assistant", "content": ANSWER}]}
        for row in PROMPTS["chat"]
    ],
    "sharegpt": [
        {"conversations": [*row["conversations"], {"from": "gpt", "value": ANSWER}]}
        for row in PROMPTS["sharegpt"]
    ],
    "alpaca": [{**row, "output": ANSWER} for row in PROMPTS["alpaca"]],
    "completion": [{**row, "completion": ANSWER} for row in PROMPTS["completion"]],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_the_same_with_answers_and_without(kind, tmp_path):
    found = []
    for rows in (PROMPTS[kind], ANSWERED[kind]):
        path = writing_recipe(tmp_path, rows, truncated="keep")
        for name in ("written.jsonl", "written.jsonl.provenance"):
            (tmp_path / name).unlink(missing_ok=True)
        summary = written(path)
        found.append(rows_of(tmp_path / "written.jsonl"))
    assert found[0] == found[1]
    texts = {r["prompt"] if kind == "completion" else r["messages"][0]["content"] for r in found[0]}
    assert len(texts) >= 2
    assert texts <= set(ASKED)
    assert ANSWER not in (tmp_path / "written.jsonl").read_text()
    config = DataConfig(path=str(summary.output), sequence_length=64)
    data = load_text(config, load_tokenizer(str(tmp_path / "teacher")), 64)
    assert data.facts["type"] == summary.kind


def test_a_document_is_continued_after_its_first_tokens(tmp_path):
    text = "The spirit of a large thing fits into a small one, and more."
    rows = [{"text": text}, {"text": f"{text} {text}"}, {"text": "Short"}]
    path = writing_recipe(tmp_path, rows, truncated="keep", prompt_tokens=9)
    summary = written(path)
    rows = rows_of(summary.output)
    assert rows
    for row in rows:
        assert text.startswith(row["prompt"])
        assert row["provenance"]["prompt_tokens"] == 9
    assert summary.left_out == {"too short or without a prompt": 1}


def test_rows_keep_the_column_names_of_the_recipe(tmp_path):
    path = writing_recipe(tmp_path, [{"q": text} for text in ASKED], truncated="keep")
    columns = "data.columns={prompt: q, completion: a}"
    summary = written(path, columns)
    assert {"q", "a"} < rows_of(summary.output)[0].keys()
    with limbeck.assemble(
        load(path, [columns, f"data.path={summary.output}", "evaluate={}"])
    ) as run:
        assert run.parts.data.num_documents == summary.progress.kept > 0


def test_every_answer_is_kept_or_counted_once(tmp_path):
    kept = [
        {"type": "length", "at_least": 3, "at_most": 9},
        {"type": "repetition", "at_most": 0.5},
        {"type": "perplexity", "at_most": 30.0},
    ]
    path = writing_recipe(tmp_path, per_prompt=4, filters=kept, tokens=16)
    progress = written(path).progress
    assert {"truncated", "length", "perplexity"} <= progress.dropped.keys()
    assert progress.kept + sum(progress.dropped.values()) == 32
    for row in rows_of(tmp_path / "written.jsonl"):
        origin = row["provenance"]
        assert 3 <= origin["tokens"] <= 9
        assert origin["finish"] == "end"
        assert origin["logprob"] >= -3.4013


def test_the_same_answer_to_the_same_prompt_is_written_once(tmp_path):
    """With so small a top_p every draw is the most probable token."""
    rows = PROMPTS["chat"] + PROMPTS["chat"]
    path = writing_recipe(tmp_path, rows, per_prompt=3, top_p=1e-6, truncated="keep")
    interrupted(path, 1)
    progress = written(path).progress
    assert progress.kept + progress.dropped.get("empty", 0) / 6 == len(ASKED)
    assert progress.dropped["duplicate"] == 5 * progress.kept


def test_an_answer_does_not_depend_on_the_size_of_batches(tmp_path):
    found = []
    for batch in (1, 5):
        name = f"written-{batch}.jsonl"
        path = writing_recipe(tmp_path, batch=batch, output=str(tmp_path / name))
        written(path)
        rows = {
            (r["provenance"]["prompt"], r["provenance"]["answer"]): r["messages"]
            for r in rows_of(tmp_path / name)
        }
        found.append(rows)
    assert found[0] == found[1]


PLUGIN = """
from limbeck.writing import filters

@filters.register("without")
def without(*, letter: str):
    return lambda answer: letter not in answer.text

@filters.register("forgetful")
def forgetful():
    return lambda answer: None

@filters.register("broken")
def broken():
    return lambda answer: answer.txt
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    filters.names()
    monkeypatch.setattr(filters, "_components", dict(filters._components))
    (tmp_path / "mine.py").write_text(PLUGIN)
    return "plugins=[mine.py]"


def test_a_users_own_filter_decides_and_is_counted_under_its_name(plugin, tmp_path):
    path = writing_recipe(tmp_path, per_prompt=4)
    one = [{"type": "without", "letter": "e"}]
    progress = written(path, plugin, f"write.filters={json.dumps(one)}").progress
    assert progress.dropped["without"] > 0
    assert progress.kept > 0
    assert all("e" not in r["messages"][-1]["content"] for r in rows_of(tmp_path / "written.jsonl"))
    (tmp_path / "mine.py").write_text(PLUGIN + "# changed")
    with pytest.raises(ConfigError, match=r"plugins\[0\]: was"):
        written(path, plugin, f"write.filters={json.dumps(one)}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forgetful", r"filters\[0\]: forgetful must return True or False, and returned None"),
        ("broken", r"filters\[0\]: broken .* failed .*AttributeError: 'Answer' object has no"),
    ],
)
def test_a_filter_that_fails_is_an_error_with_its_name(name, message, plugin, tmp_path):
    path = writing_recipe(tmp_path)
    with pytest.raises(ConfigError, match=message):
        written(path, plugin, f"write.filters=[{name}]")


def test_mistakes_of_the_section_are_named_before_a_model_loads(tmp_path):
    path = writing_recipe(tmp_path)
    for overrides, message in (
        (["write.output=x.json"], r"write\.output: must end in \.jsonl"),
        (["write.tokens=64"], r"write\.tokens: a prompt of 1 tokens and its answer must fit"),
        (
            ["write.filters=[{type: lenght}]"],
            r"no filter is called 'lenght' \(did you mean 'length",
        ),
        (["data.columns={weight: w}"], r"data\.columns\.weight: .* written rows have none"),
        (["data.columns={source: s}"], r"data\.columns\.source: .* written rows have none"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path, overrides)
    with pytest.raises(ConfigError, match="the recipe must have this section"):
        written(path, "write=null")
