"""What is read, and what of it is scored."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from limbeck.config import DataConfig, ReadConfig
from limbeck.data import data_problems, readers
from limbeck.data.hub import from_dataset
from limbeck.data.rows import open_source
from limbeck.errors import ConfigError, DataError, TryLaterError
from tests.data.data_files import load, scored_tokens, write
from tests.tokenizers.refusing_hub import refusing_hub
from tests.tokenizers.small import BEGIN, CHATML, MARKED, SENTENCES, small

TEXTS = [{"text": sentence} for sentence in SENTENCES]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What boils?"},
        {"role": "assistant", "content": "A still boils."},
        {"role": "user", "content": "And rises?"},
        {"role": "assistant", "content": "The spirit rises."},
    ]
}


def test_the_five_types_are_registered() -> None:
    assert readers.names() == ["alpaca", "chat", "completion", "sharegpt", "text"]
    assert all(readers.explain(name).summary for name in readers.names())


def test_problems_of_the_data_section_name_option_and_reason() -> None:
    config = DataConfig(type="chat", path="x", columns={"text": "body"})
    assert [problem.at for problem in data_problems(config)] == ["data.columns.text"]
    assert not list(data_problems(DataConfig(type="text", path="x", columns={"text": "body"})))


@pytest.mark.parametrize("begin", [None, BEGIN])
def test_text_has_the_tokenizers_own_special_tokens_and_one_end(
    tmp_path: Path, begin: str | None
) -> None:
    tokenizer = small(begin=begin)
    path = write(tmp_path / "rows.jsonl", TEXTS[:1])
    batch = load(path, tokenizer, sequence_length=64).batch([0])
    wanted = [*tokenizer(SENTENCES[0]).input_ids, tokenizer.eos_token_id]
    assert batch.input_ids[0].tolist() == wanted[:-1]
    assert batch.target_ids[0].tolist() == wanted[1:]
    assert bool(batch.scored.all())


def test_no_end_token_is_added_twice_or_against_the_configuration(tmp_path: Path) -> None:
    ended = write(tmp_path / "a.jsonl", [{"text": "A still.<|end|>"}])
    plain = write(tmp_path / "b.jsonl", [{"text": "A still."}])
    tokenizer = small()
    with_end = load(plain, tokenizer, sequence_length=64).batch([0]).target_ids[0].tolist()
    assert load(ended, tokenizer, sequence_length=64).batch([0]).target_ids[0].tolist() == with_end
    without = load(plain, tokenizer, sequence_length=64, append_eos=False).batch([0])
    assert without.target_ids[0].tolist() == with_end[:-1]


def test_the_tokenizers_truncation_and_padding_do_not_reach_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", TEXTS)
    tokenizer = small()
    tokenizer(["a", "b c d e f"], truncation=True, max_length=2, padding=True)
    cut = load(path, tokenizer, pack=False, sequence_length=64)
    lengths = [len(small()(sentence).input_ids) for sentence in SENTENCES]
    assert [cut.row_length(row) for row in range(5)] == lengths


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "folder"])
def test_every_form_of_file_reads_alike(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in TEXTS)
    match form:
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(TEXTS, indent=1))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(TEXTS).encode()))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(TEXTS), path)
        case "folder":
            path.mkdir()
            write(path / "a.jsonl", TEXTS[:2])
            pq.write_table(pa.Table.from_pylist(TEXTS[2:]), path / "b.parquet")
            (path / "README.md").write_text("not data")
    data = load(path)
    (tmp_path / "other").mkdir()
    plain = load(write(tmp_path / "other" / "plain.jsonl", TEXTS))
    assert data.num_documents == 5
    assert torch.equal(data.batch(range(3)).input_ids, plain.batch(range(3)).input_ids)
    last = "b.parquet:3" if form == "folder" else f"rows.{form}:5"
    if form != "json":
        assert data.document_name(4).endswith(last)


def test_hidden_files_are_skipped_but_a_hidden_parent_folder_is_allowed(tmp_path: Path) -> None:
    place = tmp_path / ".cache" / "data"
    (place / ".tmp").mkdir(parents=True)
    write(place / "a.jsonl", TEXTS[:2])
    write(place / ".tmp" / "b.jsonl", TEXTS[2:])
    write(place / ".c.jsonl", TEXTS[2:])
    assert load(place).num_documents == 2


def test_a_data_set_of_the_datasets_library_reads_as_a_file_does(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", TEXTS)
    data = datasets.load_dataset(
        "json", data_files=str(path), split="train[1:4]", cache_dir=str(tmp_path / "hf")
    )
    source = from_dataset(data, "made/up[train[1:4]]")
    rows = list(source.rows(["text"]))
    assert [row.values["text"] for row in rows] == list(SENTENCES[1:4])
    assert [row.number for row in rows] == [1, 2, 3]
    assert source.sha256 != from_dataset(data, "made/up[train]").sha256
    with pytest.raises(ConfigError, match=r"has no column 'body'; it has text"):
        list(source.rows(["body"]))


def test_a_data_set_the_hub_does_not_know_is_a_mistake_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_hub(404, "RepoNotFound") as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(ConfigError, match="must be a path here or a dataset on the Hugging"):
            open_source(ReadConfig(path="limbeck-tests/none"), tmp_path)


def test_a_data_set_out_of_reach_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TryLaterError, match=r"'limbeck-tests/none' .* a split 'train'.*online"):
        open_source(ReadConfig(path="limbeck-tests/none"), tmp_path)


def test_columns_may_have_other_names_and_rows_a_limit(tmp_path: Path) -> None:
    rows = [{"body": sentence, "text": 3} for sentence in SENTENCES]
    data = load(write(tmp_path / "r.jsonl", rows), columns={"text": "body"}, max_documents=2)
    assert data.num_documents == 2


def test_completion_scores_the_completion_alone(tmp_path: Path) -> None:
    row = {"prompt": "The spirit of a large thing", "completion": " fits into a small one."}
    tokenizer = small()
    data = load(write(tmp_path / "r.jsonl", [row]), tokenizer, kind="completion")
    assert scored_tokens(data, tokenizer) == row["completion"] + "<|end|>"
    assert data.document_bytes.tolist() == [len(row["completion"])]
    together = tokenizer(row["prompt"] + row["completion"]).input_ids
    whole = load(tmp_path / "r.jsonl", tokenizer, kind="completion", sequence_length=64).batch([0])
    assert whole.input_ids[0].tolist() == together


def test_no_token_covers_parts_of_prompt_and_completion(tmp_path: Path) -> None:
    row = {"prompt": "The spi", "completion": "rit of a large thing"}
    tokenizer = small()
    begin = tokenizer(row["prompt"]).input_ids
    together = tokenizer(row["prompt"] + row["completion"]).input_ids
    assert together[: len(begin)] != begin
    data = load(write(tmp_path / "r.jsonl", [row]), tokenizer, kind="completion")
    assert scored_tokens(data, tokenizer) == row["completion"] + "<|end|>"
    assert data.batch([0]).input_ids[0, : len(begin)].tolist() == begin


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("length", [12, 128])
def test_chat_scores_what_the_assistant_says_and_its_end_of_turn(
    tmp_path: Path, template: str, length: int
) -> None:
    tokenizer = small(template=template)  # whose padding token is its end token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    path = write(tmp_path / "r.jsonl", [CHAT])
    data = load(path, tokenizer, kind="chat", sequence_length=length, pack=False)
    said = "A still boils.<|end|>The spirit rises.<|end|>"
    assert scored_tokens(data, tokenizer) == said
    assert data.num_scored == len(tokenizer(said).input_ids)
    assert data.document_bytes.tolist() == [len("A still boils.The spirit rises.")]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_chat_has_the_tokens_of_its_rendered_template(tmp_path: Path, template: str) -> None:
    tokenizer = small(template=template)
    data = load(write(tmp_path / "r.jsonl", [CHAT]), tokenizer, kind="chat", sequence_length=200)
    batch = data.batch([0])
    wanted = tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    assert [*batch.input_ids[0].tolist(), int(batch.target_ids[0, -1])] == wanted


def test_a_beginning_token_in_the_template_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = small(template="<|begin|>" + CHATML, begin=BEGIN)
    path = write(tmp_path / "r.jsonl", [CHAT])
    batch = load(path, tokenizer, kind="chat", sequence_length=200).batch([0])
    assert batch.input_ids[0].tolist().count(tokenizer.bos_token_id) == 1


def test_parquet_chats_with_empty_keys_read_as_json_ones(tmp_path: Path) -> None:
    rows = [CHAT, {"messages": [{**m, "name": "x"} for m in CHAT["messages"]]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    tokenizer = small(template=CHATML)
    data = load(tmp_path / "r.parquet", tokenizer, kind="chat", pack=False, sequence_length=200)
    batch = data.batch([0, 1])
    assert torch.equal(batch.input_ids[0], batch.input_ids[1])


def refusal(tmp_path: Path, template: str, messages: list[dict[str, Any]]) -> str:
    path = write(tmp_path / "r.jsonl", [{"messages": messages}])
    with pytest.raises(DataError) as info:
        load(path, small(template=template), kind="chat")
    return str(info.value)


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}<|turn|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content[:3] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    told = refusal(tmp_path, forgetful, CHAT["messages"])
    assert "r.jsonl:1: messages[2]: the chat template writes what came before differently" in told


def test_a_token_across_the_border_of_an_answer_is_refused(tmp_path: Path) -> None:
    glued = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    messages = [
        {"role": "user", "content": "The spi"},
        {"role": "assistant", "content": "rit of a large thing"},
    ]
    told = refusal(tmp_path, glued, messages)
    assert "r.jsonl:1: messages: one token covers text inside and outside of answer 0" in told


def test_errors_raised_by_a_template_are_reported(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    told = refusal(tmp_path, strict + CHATML, CHAT["messages"])
    assert "r.jsonl:1: messages: the chat template refuses them: no system" in told


FORGETS_THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% set said = m.content.split('</think>')[-1] %}"
    "<|turn|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% set mind = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "<think>{{ mind if '</think>' in m.content else '' }}</think>{% endif %}{{ said }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""As Qwen3's: reasoning only after the last user message, and an empty one where there is none."""


@pytest.mark.parametrize("thought", ["", "<think>hm</think>"])
def test_a_template_that_drops_earlier_reasoning_scores_what_it_renders(
    tmp_path: Path, thought: str
) -> None:
    messages = [
        m | {"content": thought + m["content"]} if m["role"] == "assistant" else m
        for m in CHAT["messages"]
    ]
    tokenizer = small(template=FORGETS_THINKING)
    path = write(tmp_path / "r.jsonl", [{"messages": messages}])
    batch = load(path, tokenizer, kind="chat", sequence_length=256).batch([0])
    text = tokenizer.decode(batch.target_ids[0][batch.scored[0]])
    mind = "hm" if thought else ""
    assert "".join(text.split()) == "".join(
        f"A still boils.<|end|><think>{mind}</think>The spirit rises.<|end|>".split()
    )


@pytest.mark.parametrize(
    ("kind", "row", "advice"),
    [
        ("text", CHAT, "data.type: chat"),
        ("chat", {"conversations": [{"from": "human", "value": "x"}]}, "data.type: sharegpt"),
        ("text", {"instruction": "x", "input": "", "output": "y"}, "data.type: alpaca"),
        ("text", {"prompt": "x", "completion": "y"}, "data.type: completion"),
        ("chat", {"text": "x"}, "data.type: text"),
    ],
)
def test_rows_of_another_type_are_refused_with_what_to_do(
    tmp_path: Path, kind: str, row: dict[str, Any], advice: str
) -> None:
    path = write(tmp_path / "r.jsonl", [row])
    with pytest.raises(DataError) as raised:
        load(path, small(template=CHATML), kind=kind)
    assert advice in str(raised.value)


def test_a_bad_weight_is_reported_under_the_files_own_column(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"text": "A still boils.", "w": -1}])
    with pytest.raises(DataError, match="column 'w' must be a number"):
        load(path, small(), columns={"weight": "w"})
