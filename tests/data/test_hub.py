"""Hugging Face data sets: subsets, parts of splits, streams, and sets saved on disk.

Folders stand for repositories of the Hub; `datasets` reads both by the same code.
"""

from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from limbeck.config import DataConfig, ReadConfig
from limbeck.data import data_problems
from limbeck.data.rows import open_source
from limbeck.errors import ConfigError
from tests.data.data_files import load

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*.parquet
  - split: test
    path: en/test.parquet
- config_name: de
  data_files: de/*.parquet
---
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two subsets; `en` has 8 rows to train on in two files, and 2 to test on."""
    folder = tmp_path / "made"
    for name, first, last in (
        ("en/train-0", 0, 5),
        ("en/train-1", 5, 8),
        ("en/test", 100, 102),
        ("de/a", 200, 203),
    ):
        place = folder / f"{name}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        rows = {"text": [f"a still boils {i}" for i in range(first, last)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), place)
    (folder / "README.md").write_text(CARD)
    return folder


def numbers(config: ReadConfig, tmp_path: Path) -> list[int]:
    rows = open_source(config, tmp_path / "cache").rows(["text"])
    return [int(row.values["text"].split()[-1]) for row in rows]


@pytest.mark.parametrize(
    ("subset", "split", "wanted"),
    [
        ("en", "train", range(8)),
        ("en", "test", range(100, 102)),
        ("en", "train[:50%]", range(4)),
        ("en", "train[6:]", range(6, 8)),
        ("de", "train", range(200, 203)),
    ],
)
def test_a_subset_and_a_part_of_a_split_are_read(repository, tmp_path, subset, split, wanted):
    config = ReadConfig(path=str(repository), subset=subset, split=split)
    assert numbers(config, tmp_path) == list(wanted)


def test_a_stream_has_the_rows_of_the_data_set_and_is_read_no_further_than_asked(
    repository, tmp_path
):
    config = ReadConfig(path=str(repository), subset="en", streaming=True, max_documents=3)
    assert numbers(config, tmp_path) == list(range(8))
    damaged = repository / "en" / "train-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:40])  # beyond the first rows nothing is opened
    data = load(repository, subset="en", streaming=True, max_documents=3)
    assert data.num_documents == 3
    assert data.document_name(2) == "made/en[train]:3"


def test_streams_of_other_splits_and_of_changed_files_are_other_data(repository, tmp_path):
    def digest(split: str) -> str:
        config = ReadConfig(path=str(repository), subset="en", split=split, streaming=True)
        return open_source(config, tmp_path / "cache").sha256

    before = digest("train")
    assert before == digest("train")
    assert before != digest("test")
    rows = {"text": ["a still boils 9"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), repository / "en" / "train-0.parquet")
    assert digest("train") != before


def test_a_data_set_saved_on_disk_is_read_by_split(tmp_path):
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"a still boils {i}" for i in span]})
        for name, span in (("train", range(3)), ("test", range(5, 7)))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    assert numbers(ReadConfig(path=str(tmp_path / "all"), split="test"), tmp_path) == [5, 6]
    assert numbers(ReadConfig(path=str(tmp_path / "one")), tmp_path) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"data\.split: .* must have the split 'dev', and has tr"):
        open_source(ReadConfig(path=str(tmp_path / "all"), split="dev"), tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_subset_is_answered_with_those_there_are(repository, tmp_path, streaming):
    config = ReadConfig(path=str(repository), subset="fr", streaming=streaming)
    with pytest.raises(ConfigError, match=r"subset 'fr', and could not .*'en'"):
        open_source(config, tmp_path / "cache")


def test_an_unknown_column_of_a_stream_is_named(repository, tmp_path):
    config = ReadConfig(path=str(repository), subset="en", streaming=True)
    with pytest.raises(ConfigError, match="has no column 'body'; it has text"):
        list(open_source(config, tmp_path / "cache").rows(["body"]))


@pytest.mark.parametrize("option", [{"subset": "en"}, {"streaming": True}, {"revision": "v1"}])
def test_options_of_the_hub_are_refused_for_a_file(tmp_path, option):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="subset, revision and streaming belong"):
        open_source(ReadConfig(path=str(path), **option), tmp_path)


def test_a_stream_says_how_much_of_it_is_read():
    config = DataConfig(path="org/name", streaming=True, split="train[:1%]")
    assert [problem.at for problem in data_problems(config)] == ["data.max_documents", "data.split"]
