"""A recipe with a `rollout` section: text written in the run, from the recipe to the metrics."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.config import read
from limbeck.distributed import latest
from limbeck.errors import ConfigError, DataError
from tests.experiment.house import steps_of, write_recipe
from tests.train.toy import tensors

ROLLOUT = {"tokens": 12, "prompt_tokens": 6}
ON_POLICY = {"alpha": 1.0, "temperature": 1.0, "divergence": "reverse_kl"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def recipe(folder, objective=ON_POLICY, rollout=(), **changes):
    path = write_recipe(folder, objective=objective, **changes)
    whole = json.loads(path.read_text()) | {"rollout": {**ROLLOUT, **dict(rollout)}}
    path.write_text(json.dumps(whole))
    return path


def run(path, *overrides, **options):
    with limbeck.assemble(limbeck.load(path, overrides)) as whole:
        return whole.train(**options)


def written(folder):
    """Rollouts of each step."""
    count = len(list((folder / "rollouts").iterdir()))
    files = [folder / "rollouts" / f"step-{step}.jsonl" for step in range(count)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_a_run_learns_from_what_its_student_writes(tmp_path):
    outcome = run(recipe(tmp_path), "evaluate.baseline=cross_entropy", "evaluate.every=6")
    texts, steps = written(tmp_path / "run"), steps_of(tmp_path / "run")
    assert [len(rows) for rows in texts] == [4] * 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    documents = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    beginnings = {tuple(tokenizer(row["text"]).input_ids[:6]) for row in documents}
    tokens = 0
    for rows, record in zip(texts, steps, strict=True):
        assert {tuple(row["prompt_ids"]) for row in rows} <= beginnings
        tokens += sum(len(row["token_ids"]) for row in rows)
        assert record["tokens"] == tokens
        assert record["rollout_length"] == sum(len(row["token_ids"]) for row in rows) / 4
        assert 0 < record["rollout_entropy"] < 7
        assert 0 < record["rollout_seconds"] < record["seconds"]
    figures = outcome.evaluation["arms"]
    assert figures["distilled"]["forward_kl"]["value"] != figures["initial"]["forward_kl"]["value"]
    anchor = tmp_path / "run" / "stages" / "cross_entropy"
    assert not (anchor / "rollouts").exists()
    assert "rollout_length" not in steps_of(anchor)[0]
    notes = json.loads((tmp_path / "run" / "provenance.json").read_text())["vocabulary"]["notes"]
    assert "Rollouts continue 40 prompts of 6 tokens." in notes


def test_the_baseline_reads_what_it_reads_without_rollouts(tmp_path):
    changes = ("evaluate.baseline=cross_entropy", "optim.steps=2", "evaluate.every=2")
    losses = []
    for name in ("with", "without"):
        folder = tmp_path / name
        folder.mkdir()
        path = recipe(folder) if name == "with" else write_recipe(folder, objective=ON_POLICY)
        run(path, *changes)
        steps = steps_of(folder / "run" / "stages" / "cross_entropy")
        losses.append([(record["loss"], record["tokens"]) for record in steps])
    assert losses[0] == losses[1]


def test_half_of_a_step_may_be_fixed_text_and_a_resume_is_exact(tmp_path):
    path = recipe(tmp_path, rollout={"share": 0.5}, evaluate={"data": None})
    run(path, "checkpoint.every=3")
    texts, steps = written(tmp_path / "run"), steps_of(tmp_path / "run")
    assert [len(rows) for rows in texts] == [2] * 6
    whole = tensors(latest(tmp_path / "run" / "checkpoints"))
    (tmp_path / "run").rename(tmp_path / "whole")
    overrides = ["checkpoint.every=3"]
    with limbeck.assemble(limbeck.load(path, overrides)) as cut:
        cut.parts.config.optim.__dict__  # the recipe is the same; the run is stopped from outside
        stop_after(cut, 4)
    run(path, *overrides, resume=True)
    assert written(tmp_path / "run") == texts
    again = tensors(latest(tmp_path / "run" / "checkpoints"))
    assert all((again[name] == value).all() for name, value in whole.items())
    assert [r["loss"] for r in steps_of(tmp_path / "run")] == [r["loss"] for r in steps]
