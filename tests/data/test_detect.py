"""Data sets as people have them: detected, read, and skipped where they cannot be."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limbeck.config import DataConfig
from limbeck.data import data_problems, uses_template
from limbeck.data.detect import added_columns
from limbeck.data.formats.text import Text
from limbeck.data.inputs import require_first_rows
from limbeck.errors import ConfigError, DataError
from tests.data.data_files import load, scored_tokens, write
from tests.tokenizers.small import CHATML, MARKED, small

TOOLS = (
    "{% if tools %}<|turn|>system\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
EXAMPLES = [
    (kind, row)
    for kind, part in re.findall(r"### `(\w+)`\n(.*?)(?=\n##|\Z)", PAGE, re.DOTALL)
    for row in re.findall(r"```json\n(.*?)\n```", part, re.DOTALL)
]
ANSWERS = {
    "text": " still boils the wash and catches what rises.<|end|>",
    "completion": " A still boils.<|end|>",
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What boils?"}
ANSWER = {"role": "assistant", "content": "A still boils."}


def test_the_page_has_a_row_of_every_type() -> None:
    assert {kind for kind, _ in EXAMPLES} == {"text", "completion", "chat", "sharegpt", "alpaca"}


@pytest.mark.parametrize(("kind", "row"), EXAMPLES, ids=[kind for kind, _ in EXAMPLES])
def test_a_row_of_the_page_is_detected_and_read(tmp_path: Path, kind: str, row: str) -> None:
    path = write(tmp_path / "r.jsonl", [json.loads(row)])
    tokenizer = small(template=TOOLS)
    data = load(path, tokenizer, kind="auto", sequence_length=400)
    assert data.facts["type"] == kind
    said = scored_tokens(data, tokenizer)
    if "tool_calls" in row:
        assert said == '<call>boil{"degrees": 100}</call><|end|>It boils.<|end|>'
    else:
        assert said == ANSWERS.get(kind, "A still boils.<|end|>")
    assert load(path, tokenizer, kind=kind, sequence_length=400).num_scored == data.num_scored


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "What boils?"},
                           {"from": "gpt", "value": "A still boils."}], "id": 7},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"from": "user", "value": "What boils?"}, ANSWER]},
        {"messages": [{**USER, "content": [{"type": "text", "text": "What "},
                                           {"type": "text", "text": "boils?"}]}, ANSWER]},
        {"instruction": "What boils?", "output": "A still boils."},
        {"instruction": "What boils?", "input": " ", "output": "A still boils."},
        {"messages": [USER, ANSWER], "text": "rendered somewhere else", "tools": []},
    ],
)  # fmt: skip
def test_all_forms_of_a_conversation_read_alike(
    tmp_path: Path, row: dict[str, Any], template: str
) -> None:
    tokenizer = small(template=template)
    data = load(write(tmp_path / "r.jsonl", [row]), tokenizer, kind="auto", sequence_length=200)
    wanted = tokenizer.apply_chat_template([USER, ANSWER], return_dict=True)["input_ids"]
    assert data.tokens.tolist() == wanted
    assert scored_tokens(data, tokenizer) == "A still boils.<|end|>"


def test_a_system_prompt_in_a_column_of_its_own_comes_first(tmp_path: Path) -> None:
    rows = [
        {"conversations": [USER, ANSWER], "system": "Be brief."},
        {"conversations": [SYSTEM, USER, ANSWER], "system": None},
    ]
    tokenizer = small(template=CHATML)
    path = write(tmp_path / "r.jsonl", rows)
    data = load(path, tokenizer, sequence_length=200, kind="auto", pack=False)
    wanted = tokenizer.apply_chat_template([SYSTEM, USER, ANSWER], return_dict=True)["input_ids"]
    assert data.tokens.tolist() == wanted * 2


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_optional_columns_are_read_where_they_are_there(tmp_path: Path, name: str) -> None:
    rows = [
        {"instruction": "Say it.", "input": "What boils?", "output": "A still.", "id": 1},
        {"instruction": "Say it.", "input": "", "output": "A still.", "id": 2},
    ]
    path = write(tmp_path / "r.jsonl", rows)
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    tokenizer = small(template=CHATML)
    data = load(tmp_path / name, tokenizer, kind="auto", sequence_length=200, pack=False)
    texts = [tokenizer.decode(data.batch([row]).input_ids[0]) for row in (0, 1)]
    assert ["Say it.\n\nWhat boils?" in text for text in texts] == [True, False]
    renamed = load(path, tokenizer, kind="auto", sequence_length=200, columns={"input": "none"})
    assert renamed.num_documents == 2
    assert path.exists()


def test_columns_decide_among_types(tmp_path: Path) -> None:
    row = {"messages": [USER, ANSWER], "body": "A still boils."}
    path = write(tmp_path / "r.jsonl", [row])
    data = load(path, small(template=CHATML), kind="auto", columns={"text": "body"})
    assert data.facts["type"] == "text"
    config = DataConfig(path=str(path), columns={"textt": "body"})
    assert [problem.at for problem in data_problems(config)] == ["data.columns.textt"]


def test_a_null_column_does_not_make_a_type(tmp_path: Path) -> None:
    rows = [{"messages": None, "text": "A still boils."}]
    assert load(write(tmp_path / "r.jsonl", rows), kind="auto").facts["type"] == "text"
    path = write(tmp_path / "s.jsonl", [{"text": None}])
    with pytest.raises(DataError, match="column 'text' must be a string, got null"):
        load(path, kind="auto")


def test_columns_of_no_type_are_refused_with_all_types(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"body": "A still boils.", "label": 3}])
    with pytest.raises(DataError) as raised:
        require_first_rows(DataConfig(path=str(path)))
    told = str(raised.value)
    assert f"{path}:1: the row must have the columns of a data type" in told
    assert "alpaca: instruction, output" in told
    assert "and has 'body', 'label'. Set data.type, and data.columns" in told


def test_the_first_readable_row_decides_and_files_without_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("{\n" + json.dumps({"text": "A still boils."}) + "\n")
    assert load(path, kind="auto", bad_rows="skip").facts["type"] == "text"
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"r\.jsonl:1: must be JSON"):
        load(path, kind="auto")


def test_a_folder_of_plain_text_has_a_document_a_file(tmp_path: Path) -> None:
    place = tmp_path / "texts"
    (place / "more").mkdir(parents=True)
    (place / "a.txt").write_text("A still boils the wash.")
    (place / "more" / "b.md").write_bytes(b"\xef\xbb\xbf" + "Grüße aus Köln.".encode())
    (place / "c.doc").write_text("not read")
    tokenizer = small()
    data = load(place, tokenizer, kind="auto", pack=False, sequence_length=64)
    assert [data.document_name(i) for i in range(2)] == ["a.txt:1", "more/b.md:1"]
    assert tokenizer.decode(data.batch([1]).input_ids[0]).startswith("Grüße")
    single = tmp_path / "a.txt"
    single.write_text("One document.")
    assert load(single, tokenizer, kind="auto").num_documents == 1
    (place / "d.txt").write_bytes(b"caf\xe9")
    (place / "e.txt").write_bytes(b" \n")
    with pytest.raises(DataError) as raised:
        load(place, tokenizer, kind="auto")
    assert "d.txt:1: must be UTF-8, and has byte 0xe9 at 3" in str(raised.value)
    assert "e.txt:1: must hold text, and is empty" in str(raised.value)
    write(place / "rows.jsonl", [{"text": "Rows come before text files."}])
    assert load(place, tokenizer, kind="auto").num_documents == 1


def call(arguments: Any = "{}", **function: Any) -> dict[str, Any]:
    tool = {"function": {"name": "boil", "arguments": arguments, **function}}
    return {"role": "assistant", "content": None, "tool_calls": [tool]}


IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [{**USER, "content": [IMAGE]}, ANSWER]},
         "messages[0].content[0] must be a text part, the only kind that is read, got 'image_url'"),
        ({"messages": [{**USER, "content": ["What?"]}, ANSWER]}, "a text part, the only kind"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}, ANSWER]},
         "messages[0].content[0].text must be a string, got NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": None}]},
         "messages[1].content must be a string, got null"),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "boil"}}]},
         "messages[1].function_call is an older form that is not read; write it as tool_calls"),
        ({"messages": [USER, call("{")]},
         "messages[1].tool_calls[0].function.arguments must be JSON, got '{'"),
        ({"messages": [USER, call("[1]")]}, "arguments must be a JSON object, got list"),
        ({"messages": [USER, call(name=3)]}, "tool_calls[0].function.name must be a string, got 3"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "boil"}]}, "tool_calls must be a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": ["boil"]}]}, "must be a mapping with a func"),
        ({"messages": [USER, ANSWER], "tools": "boil"}, "column 'tools' must be JSON, got 'boil'"),
        ({"messages": [USER, ANSWER], "tools": ["boil"]}, "'tools' must be a list of mappings"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "bot", "value": "y"}]},
         "conversations[1].from must be one of human, gpt,"),
        ({"conversations": [{"from": "gpt", "value": "x"}]},
         "conversations[0]: an assistant message must answer an earlier one, got none"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "system": "Be brief."}, None),
        ({"conversations": [SYSTEM, USER, ANSWER], "system": "Be brief."},
         "column 'system' must be empty where conversations[0] is a system message too"),
        ({"instruction": "x", "output": ""}, "column 'output'.content must hold text, got ''"),
        ({"instruction": "x", "input": 3, "output": "y"}, "column 'input' must be a string, got"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_read_is_named(
    tmp_path: Path, row: dict[str, Any], told: str | None
) -> None:
    path = write(tmp_path / "r.jsonl", [row])
    if told is None:
        assert load(path, small(template=TOOLS), kind="auto").num_documents == 1
        return
    with pytest.raises(DataError) as raised:
        load(path, small(template=TOOLS), kind="auto")
    assert f"{path}:1: " in str(raised.value)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [USER, call()]}, "messages[1].tool_calls: the chat template does not write"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "boil"}]},
         "column 'tools': the chat template describes no tools"),
        ({"messages": [USER, ANSWER, {"role": "tool", "content": "x"}, ANSWER]},
         "messages[2]: the chat template writes no tool results"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_a_template_would_leave_out_is_refused_by_name(
    tmp_path: Path, row: dict[str, Any], told: str, template: str
) -> None:
    deaf = template.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}")
    path = write(tmp_path / "r.jsonl", [row])
    with pytest.raises(DataError) as raised:
        load(path, small(template=deaf), kind="auto")
    assert told in str(raised.value)
    assert "use a model whose template has tools" in str(raised.value)


def test_alpaca_without_a_template_is_told_how_to_be_read(tmp_path: Path) -> None:
    row = {"instruction": "What boils?", "output": " A still boils."}
    path = write(tmp_path / "r.jsonl", [row])
    with pytest.raises(ConfigError, match=r"data.type: Alpaca needs a tokenizer with a chat templ"):
        load(path, kind="auto")
    tokenizer = small()
    columns = {"prompt": "instruction", "completion": "output"}
    data = load(path, tokenizer, kind="auto", columns=columns)
    assert scored_tokens(data, tokenizer) == " A still boils.<|end|>"


def test_a_configuration_knows_whether_its_text_needs_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"conversations": [USER, ANSWER]}])
    assert uses_template(DataConfig(path=str(path)))
    path = write(tmp_path / "s.jsonl", [{"text": "A still boils."}])
    assert not uses_template(DataConfig(path=str(path)))


def test_bad_rows_are_skipped_on_demand_and_counted(tmp_path: Path) -> None:
    good = [{"text": f"A still boils {i} times."} for i in range(3)]
    rows = [good[0], {"text": ""}, good[1], {"body": "x"}, good[2], *[{"text": None}] * 5]
    path = write(tmp_path / "r.jsonl", rows)
    with pytest.raises(DataError, match="bad_rows: skip to train on the others"):
        load(path, kind="auto")
    data = load(path, kind="auto", bad_rows="skip", pack=False)
    assert [data.document_name(i) for i in range(3)] == ["r.jsonl:1", "r.jsonl:3", "r.jsonl:5"]
    bad = data.facts["bad_rows"]
    assert bad["skipped"] == 7
    assert bad["first"][0] == "r.jsonl:2: column 'text' must hold text, got ''"
    assert len(bad["first"]) == 5
    clean = load(write(tmp_path / "s.jsonl", good), kind="auto", pack=False)
    assert data.tokens.tolist() == clean.tokens.tolist()
    assert clean.facts["bad_rows"] == {"skipped": 0, "first": []}


def test_the_page_shows_the_message_of_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {**ANSWER, "content": ""}]},
        {"messages": [{**USER, "content": [IMAGE]}, ANSWER]},
    ]
    path = write(Path("train.jsonl"), rows)
    with pytest.raises(DataError) as raised:
        load(path, small(template=CHATML), kind="auto")
    assert f"```\n{raised.value}\n```" in PAGE


def test_rows_that_fail_in_the_template_are_skipped_too(tmp_path: Path) -> None:
    rows = [{"messages": [ANSWER]}, {"messages": [USER, ANSWER]}, {"messages": [ANSWER, USER]}]
    path = write(tmp_path / "r.jsonl", rows)
    data = load(path, small(template=CHATML), kind="auto", bad_rows="skip", sequence_length=64)
    assert data.num_documents == 1
    assert data.facts["bad_rows"]["skipped"] == 2


def test_skipping_every_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(DataError, match="2 are not:") as raised:
        load(path, bad_rows="skip")
    assert "bad_rows" not in str(raised.value)
    with pytest.raises(DataError, match="2 are not:"):
        require_first_rows(DataConfig(path=str(path), bad_rows="skip"))
    write(path, [{"text": ""}])
    with pytest.raises(DataError, match="must be readable; 1 is not:"):
        load(path, bad_rows="skip")
    write(path, [*[{"text": ""}] * 20, {"text": "A still boils."}])
    require_first_rows(DataConfig(path=str(path), bad_rows="skip"))


def test_a_type_with_a_column_called_source_keeps_it() -> None:
    class Translation(Text):
        columns = ("source", "target")

    config = DataConfig(columns={"source": "en", "weight": "worth"})
    assert added_columns(config, Translation()) == {"weight": "worth"}
    assert added_columns(config, Text()) == {"weight": "worth", "source": "en"}
