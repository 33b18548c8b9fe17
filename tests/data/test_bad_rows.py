"""Bad input stops before a model is loaded, and names file, line and column."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.data import build
from limbeck.errors import ConfigError, DataError, StorageError
from tests.data.data_files import load, write
from tests.tokenizers.small import CHATML, small

GOOD = {"text": "The spirit of a large thing."}
USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"body": "x"}, "column 'text' is missing; the row has 'body'"),
        ({"text": None}, "column 'text' must be a string, got null"),
        ({"text": 3}, "column 'text' must be a string, got int 3"),
        ({"text": ["a"]}, "column 'text' must be a string, got list ['a']"),
        ({"text": ""}, "column 'text' must hold text, got ''"),
        ({"text": " \n"}, "column 'text' must hold text, got ' \\n'"),
        ({"text": "a\0b"}, "column 'text' must hold text, and has a NUL character at 1"),
        ({"text": "a\ud800"}, "valid Unicode, and has half a surrogate pair at 1"),
        ([1], "must be a JSON object, got list"),
    ],
)
def test_a_bad_text_is_named_by_line_and_column(tmp_path: Path, row: Any, told: str) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
    with pytest.raises(DataError) as info:
        load(path)
    assert f"{path}:2: " in str(info.value)
    assert told in str(info.value)
    assert info.value.exit_code == 3


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "caf\xe9 au lait"}', "must be UTF-8, and has byte 0xe9 at 13"),
        (b'{"text": "a\x00b"}', "must be text, and has a NUL byte at 11"),
        (b'{"text": "a"', "must be JSON: Expecting"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "must be JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good enough"}\n' + line + b"\n")
    with pytest.raises(DataError) as info:
        load(path)
    assert f"{path}:2: {told}" in str(info.value)


def test_the_first_five_bad_rows_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *[{"text": ""}] * 7])
    with pytest.raises(DataError, match="7 are not, the first 5:") as info:
        load(path)
    assert [f"{path}:{n}:" in str(info.value) for n in range(1, 9)] == [False] + [True] * 5 + [
        False
    ] * 2


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "column 'messages' must be a list of messages that is not empty"),
        ("hello", "column 'messages' must be a list"),
        ([USER, {"role": "bot", "content": "x"}], "messages[1].role must be one of system,"),
        ([USER, {"role": "assistant"}], "messages[1].content must be a string, got null"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1].content must hold text"),
        ([USER, "Because."], "messages[1] must be a mapping with role and content, got str"),
        ([ANSWER], "messages[0]: an assistant message must answer an earlier one, got none"),
    ],
)
def test_a_bad_chat_is_named_by_message(tmp_path: Path, messages: Any, told: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(DataError) as info:
        load(path, small(template=CHATML), kind="chat")
    assert f"{path}:1: {told}" in str(info.value)


def test_a_bad_completion_is_named_by_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": None}])
    with pytest.raises(DataError, match=r":1: column 'completion' must be a string, got null"):
        load(path, kind="completion")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert load(path).num_documents == 1


def test_a_line_of_ten_megabytes_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**GOOD, "other": "a b " * 2_500_000}, GOOD])
    assert load(path).num_documents == 2


@pytest.mark.long
def test_a_text_of_ten_megabytes_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a b " * 2_500_000}, GOOD])
    data = load(path, sequence_length=4096)
    assert data.document_bytes[0] == 10_000_000 - 1
    assert data.num_documents == 2


def test_gzip_under_a_plain_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(DataError, match=r"is packed with gzip\. Name it rows\.jsonl\.gz"):
        load(path)


def test_plain_text_under_a_gzip_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", [GOOD])
    with pytest.raises(DataError, match="must be packed with gzip, and is not"):
        load(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b[:30] + b"\xff" + b[31:]])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "rows.jsonl.gz"
    body = "".join(json.dumps({"text": f"line {n * n}"}) + "\n" for n in range(300))
    path.write_bytes(damage(gzip.compress(body.encode())))
    with pytest.raises(DataError, match="must be a whole gzip file, and is damaged"):
        load(path)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a b c"] * 50}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="must be a whole Parquet file"):
        load(path)


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a"], "title": ["b"]}), path)
    with pytest.raises(DataError, match="column 'text' is missing; it has body, title"):
        load(path)


def test_a_null_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a b c", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: column 'text' must be a string"):
        load(path)


def test_a_json_file_that_is_no_list_of_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a b"}, 3]')
    with pytest.raises(DataError, match=r"rows\.json:2: must be a JSON object, got int"):
        load(path)
    path.write_text('[{"text": "a b"}')
    with pytest.raises(DataError, match=r"rows\.json must be JSON"):
        load(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="must hold rows, and has none"):
        load(tmp_path / name)


def test_data_of_which_nothing_is_left_is_refused_with_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match="all of its rows were dropped") as info:
        load(path, append_eos=False)
    table = [line.split(maxsplit=1) for line in str(info.value).split("\n")[1:-1]]
    assert table == [["2", "rows read"], ["2", "less than two tokens"], ["0", "rows left"]]


def test_chats_without_an_assistant_turn_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": [USER]}, {"messages": [USER, ANSWER]}]
    tokenizer = small(template=CHATML)
    data = load(write(tmp_path / "a.jsonl", rows), tokenizer, kind="chat", sequence_length=64)
    assert data.facts["dropped"] == {"nothing to predict": 1}
    assert data.document_bytes.tolist() == [0, len("Because.")]
    with pytest.raises(DataError, match="1  nothing to predict"):
        load(write(tmp_path / "b.jsonl", rows[:1]), small(template=CHATML), kind="chat")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("./nowhere.jsonl", "data.path: ./nowhere.jsonl must exist, and does not"),
        ("/nowhere", "data.path: /nowhere must exist, and does not"),
    ],
)
def test_a_path_that_does_not_exist_is_a_mistake_of_the_configuration(
    tmp_path: Path, path: str, told: str
) -> None:
    from limbeck.config import DataConfig
    from limbeck.data import load_data

    with pytest.raises(ConfigError, match=told):
        load_data(
            DataConfig(type="text", path=path), small(), cache=tmp_path / "c", max_positions=None
        )


def test_a_file_of_another_kind_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_text("a b c")
    with pytest.raises(ConfigError, match=r"must end in one of \.jsonl, \.jsonl\.gz"):
        load(tmp_path / "notes.doc")
    with pytest.raises(ConfigError, match=r"must hold files ending in .* and has none"):
        load(tmp_path)


def test_a_cache_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cache must be a folder that can be written"):
        load(path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "texts"}, r"data\.type: no data type is called 'texts' \(did you mean 'text'"),
        ({"columns": {"txt": "body"}}, r"data\.columns\.txt: .* \(did you mean 'text'\?\)"),
        (
            {"sequence_length": 65, "max_positions": 64},
            r"data\.sequence_length: must be at most 64",
        ),
    ],
)
def test_mistakes_of_the_configuration_come_before_any_row(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": None}])
    with pytest.raises(ConfigError, match=told):
        load(path, **options)


def test_a_tokenizer_without_an_end_token_cannot_append_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ConfigError, match=r"data\.append_eos: needs a tokenizer with an end token"):
        load(path, small(end=None))
    assert load(path, small(end=None), append_eos=False).num_documents == 1


def test_chat_needs_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        load(path, kind="chat")


@pytest.mark.parametrize("weight", [-1, True, "1", None, math.nan, math.inf, 2_000_000, [1]])
def test_a_weight_that_cannot_be_one_is_refused_with_its_line(tmp_path: Path, weight: Any) -> None:
    rows = [GOOD | {"weight": 1}, GOOD | {"weight": weight}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'weight' must be a number from 0"):
        load(path, columns={"weight": "weight"})
    load(path)  # nobody asked for weights


def test_a_weight_that_is_asked_for_must_be_there_and_not_always_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(DataError, match="column 'worth' is missing; the row has 'text'"):
        load(path, columns={"weight": "worth"})
    path = write(tmp_path / "zero.jsonl", [GOOD | {"weight": 0}] * 2)
    with pytest.raises(DataError, match="weight is above 0, and all are 0"):
        load(path, columns={"weight": "weight"})


@pytest.mark.parametrize("source", [1, True, None, "", " ", ["code"], "a\0b", "\ud800"])
def test_a_source_that_cannot_be_one_is_refused_with_its_line(tmp_path: Path, source: Any) -> None:
    rows = [GOOD | {"domain": "code"}, GOOD | {"domain": source}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'domain' must "):
        load(path, columns={"source": "domain"})
    left = load(path, columns={"source": "domain"}, bad_rows="skip")
    assert left.document_sources.tolist() == [0]
    load(path)  # nobody asked for sources


def test_a_source_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD | {"domain": "code"}, GOOD])
    with pytest.raises(DataError, match=r"rows.jsonl:2: column 'domain' is missing; .* 'text'"):
        load(path, columns={"source": "domain"})


def test_a_column_with_too_many_values_is_no_source(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(build, "MOST_SOURCES", 2)
    rows = [GOOD | {"url": f"u{i % 3}"} for i in range(5)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"at most 2 different sources, and column 'url' of .*rows"):
        load(path, columns={"source": "url"})
    assert load(path, columns={"source": "url"}, max_documents=2).facts["document_sources"] == [
        "u0",
        "u1",
    ]
