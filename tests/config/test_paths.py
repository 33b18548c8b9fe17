"""Models and texts that are not there are refused before a model library is imported."""

import json
from pathlib import Path

import pytest

from limbeck.config.reading import Needs, require_options, require_paths
from limbeck.errors import ConfigError, DataError, TryLaterError

RECIPE = {
    "teacher": {"type": "online", "path": "model"},
    "student": {"type": "pretrained", "path": "model"},
    "data": {"path": "text.jsonl"},
    "evaluate": {"data": "text.jsonl"},
    "optim": {"learning_rate": 0.001, "steps": 4},
    "output": "run",
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("hollow").mkdir()
    Path("text.jsonl").write_text('{"text": "a"}\n')
    Path("empty.jsonl").touch()
    Path("notes").write_text("no model")
    Path("recipe.yaml").write_text(json.dumps(RECIPE))


def require(*changes: str, needs: Needs | None = None) -> None:
    require_options(Path("recipe.yaml"), changes, needs or Needs())


def test_a_recipe_whose_models_and_texts_are_there_passes() -> None:
    require()
    require("teacher.path=owner/name", "data.path=owner/name", "evaluate.data=null")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.path=./nowhere", "teacher.path: There must be a model at nowhere"),
        ("student.path=a/b/c", "student.path: There must be a model at a/b/c"),
        ("teacher.path=hollow", "teacher.path: A model's folder must hold config.json"),
        ("teacher.path=no.gguf", "teacher.path: A model must be a folder, a .gguf file that exist"),
        ("student.path=notes", "student.path: A model must be a folder"),
        ("data.path=no.jsonl", "data.path: no.jsonl must exist, and does not"),
        ("data.path=./folder", "data.path: ./folder must exist"),
        ("data={mix: [{path: text.jsonl}, {path: no.txt}]}", "data.mix[1].path: no.txt must exist"),
        ("evaluate.data={one: text.jsonl, two: /no}", "evaluate.data.two: /no must exist"),
        (
            "teacher={type: ensemble, teachers: [{type: online, path: ./nowhere}]}",
            "teacher.teachers[0].path: There must be a model at nowhere",
        ),
        (
            "teacher={type: routed, teachers: {code: {type: online, path: hollow}}}",
            "teacher.teachers.code.path: A model's folder must hold config.json",
        ),
    ],
)
def test_what_is_not_there_is_named_with_its_option(change: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require(change)
    assert f"recipe.yaml cannot be run:\n  {message}" in str(refused.value)


def test_everything_is_named_in_one_message() -> None:
    changes = ["teacher.path=./a", "student.path=./b", "data.path=c.txt", "evaluate.data=./d"]
    with pytest.raises(ConfigError) as refused:
        require(*changes, "evaluate.data=empty.jsonl")
    options = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert options == ["teacher.path", "student.path", "data.path", "evaluate.data"]


def test_an_empty_text_is_bad_data() -> None:
    with pytest.raises(DataError, match=r"data\.path: empty\.jsonl must hold rows, and is empty"):
        require("data.path=empty.jsonl")


def test_only_paths_that_a_command_reads_must_be_there() -> None:
    missing = ["student.path=./b", "evaluate.data=./d"]
    require(*missing, needs=Needs(student=False))
    require("data.path=./c", "evaluate.data=./d", needs=Needs(texts=False))
    require("teacher.path=./a", *missing, needs=Needs(models=False, texts=False))
    with pytest.raises(ConfigError, match=r"teacher\.path"):
        require("teacher.path=./a", needs=Needs(student=False, texts=False))


def test_a_model_of_the_hub_is_refused_offline_unless_it_is_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "hub")
    models = [("TEACHER", {"path": "owner/name"})]
    with pytest.raises(TryLaterError, match=r"TEACHER: 'owner/name' \(revision main\) is no folde"):
        require_paths("distill", models, [])
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = Path("hub/models--owner--name")
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    require_paths("distill", models, [])
