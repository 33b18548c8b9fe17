"""`limbeck distill TEACHER STUDENT DATA`: the recipe it writes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
import yaml
from typer.testing import CliRunner

import limbeck
from limbeck.commands.distill import distill
from limbeck.commands.first_recipe import write_recipe
from limbeck.config import RunConfig
from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.experiment import run as experiment
from limbeck.experiment.parts import Parts
from tests.experiment.tiny_run import steps_of, write_model, write_texts
from tests.tokenizers.small import BEGIN, CHATML, small

SMALL = [
    "data.sequence_length=32",
    "optim.tokens_per_step=128",
    "device=cpu",
    "evaluate.allow_worse_teacher=true",  # random weights
]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    write_model(Path("teacher"), rows=len(small()))
    small(template=CHATML).save_pretrained("teacher")
    write_texts(Path("train.jsonl"), 30, seed=1)


def run(*arguments: str, code: int = 0) -> str:
    app = typer.Typer()
    app.command()(distill)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_a_number_of_layers_is_a_pruned_student_and_trains(tmp_path: Path) -> None:
    told = run("teacher", "2 layers", "train.jsonl", *SMALL, "optim.steps=2")
    text = Path("runs/teacher-to-2-layers.yaml").read_text()
    assert text in told
    assert "The plan" in told, "it is checked first"
    assert "# which layers to keep" in text
    recipe = yaml.safe_load(text)
    assert recipe["student"] == {"type": "depth", "keep": 2, "by": "block_influence"}
    assert recipe["optim"]["steps"] == 2
    assert "epochs" not in recipe["optim"]
    folder = tmp_path / "runs" / "teacher-to-2-layers"
    assert len(steps_of(folder)) == 2
    assert (folder / "student" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match=r"already holds a run\. Add --resume to continue it"):
        run("teacher", "2 layers", "train.jsonl", *SMALL)
    assert "student" in run("teacher", "2 layers", "train.jsonl", "--resume")


@pytest.mark.parametrize("more", [(), ("trainable.lora={rank: 2}",), ("parallel.shard=always",)])
def test_models_are_loaded_once_and_checking_them_changes_nothing(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, loads = experiment.gather_parts, []

    def counted(config: RunConfig, world: World) -> Parts:
        loads.append(config.output)
        return gather(config, world)

    monkeypatch.setattr(experiment, "gather_parts", counted)
    run("teacher", "2 layers", "train.jsonl", *SMALL, "optim.steps=3", "output=here", *more)
    assert len(loads) == (2 if "parallel.shard=always" in more else 1)
    run("here.yaml", "output=there")
    first, second = (Path(each, "student", "model.safetensors") for each in ("here", "there"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("word", "params"), [("1.5B", "1.5B"), ("60m", "60M")])
def test_a_size_is_a_pruned_student_of_at_most_so_many_parameters(word: str, params: str) -> None:
    path = write_recipe(["teacher", word, "train.jsonl"], keep_run=False)
    assert path == Path(f"runs/teacher-to-{params}.yaml")
    student = limbeck.load(path).student
    assert student == {"type": "depth", "params": params, "by": "block_influence"}
    Path(word).mkdir()  # a folder of that name is a model
    with pytest.raises(ConfigError, match=r"config\.json|no model|must be"):
        write_recipe(["teacher", word, "train.jsonl"], keep_run=False)


def test_a_base_student_of_an_instruct_teacher_trains_on_sharegpt(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", rows=len(small()), layers=2, seed=1)
    small(end=BEGIN).save_pretrained(base)
    turns = [{"from": "human", "value": "What boils?"}, {"from": "gpt", "value": "A still."}]
    Path("chat.jsonl").write_text(f"{json.dumps({'conversations': turns})}\n" * 8)
    told = run("teacher", "base", "chat.jsonl", *SMALL, "output=here", "optim.epochs=2")
    assert yaml.safe_load(Path("here.yaml").read_text())["student"]["tokenizer"] == "teacher"
    config = json.loads(Path("here/student/config.json").read_text())
    assert config["eos_token_id"] == small().eos_token_id
    assert "learning_rate: 2.0e-05" in told


QUESTION, ANSWER = "What boils the wash?", "A still boils the wash."


def lines(row: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "rows.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 8)
        return path

    return write


def text_folder(folder: Path) -> Path:
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / "texts" / f"{number}.txt").write_text(f"{number}. {ANSWER}")
    return folder / "texts"


def parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [ANSWER] * 8}), path)
    return path


def openai(content: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": content}
    return {"messages": [asked, {"role": "assistant", "content": ANSWER}]}


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        (
            "ShareGPT",
            lines(
                {
                    "conversations": [
                        {"from": "human", "value": QUESTION},
                        {"from": "gpt", "value": ANSWER},
                    ]
                }
            ),
        ),
        ("Alpaca", lines({"instruction": QUESTION, "input": "", "output": ANSWER})),
        ("chat", lines(openai([{"type": "text", "text": QUESTION}]))),
        ("prompts and completions", lines({"prompt": QUESTION, "completion": ANSWER})),
        ("plain text", text_folder),
        ("plain text", parquet),
    ],
    ids=["ShareGPT", "Alpaca", "OpenAI messages", "prompt and completion", "folder", "Parquet"],
)
def test_published_shapes_of_data_train_without_a_recipe(
    kind: str, write: Callable[[Path], Path], tmp_path: Path
) -> None:
    run("teacher", "2 layers", str(write(tmp_path)), *SMALL, "optim.steps=1", "output=here")
    assert len(steps_of(Path("here"))) == 1
    notes = json.loads(Path("here/provenance.json").read_text())["vocabulary"]["notes"]
    assert any(note.endswith(f"is read as {kind}.") for note in notes)


def test_plan_writes_and_checks_and_trains_nothing(tmp_path: Path) -> None:
    told = run("teacher", "2", "train.jsonl", *SMALL, "--plan")
    assert "The plan" in told
    assert not (tmp_path / "runs" / "teacher-to-2-layers").exists()
    assert limbeck.load("runs/teacher-to-2-layers.yaml").optim.epochs == 1


def test_rows_are_as_long_as_both_models_read() -> None:
    limit = json.loads(Path("teacher/config.json").read_text())["max_position_embeddings"]
    path = write_recipe(["teacher", "2", "train.jsonl"], keep_run=False)
    assert limbeck.load(path).data.sequence_length == min(limit, 1024)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["teacher", "train.jsonl"], r"got teacher train\.jsonl\. For example: limbeck distill"),
        (["teacher", "2", "train.jsonl", "other"], "distill takes a recipe, or a teacher"),
        (["./nowhere", "2", "train.jsonl"], "There must be a model at nowhere"),
        (["teacher", "./nowhere", "train.jsonl"], "There must be a model at nowhere"),
        (["teacher", "2", "train.jsonl", "optim.lr=1"], r"here it is optim\.learning_rate"),
        (["teacher", "2", "train.jsonl", "teacher={type: onl"], "is not YAML"),
    ],
)
def test_what_cannot_be_run_is_refused_and_leaves_no_recipe(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        write_recipe(words, keep_run=False)
    assert not list(Path("runs").glob("*.yaml"))


def test_several_processes_need_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="Several processes need a recipe"):
        write_recipe(["teacher", "2", "train.jsonl"], keep_run=False)
