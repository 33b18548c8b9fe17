"""Runs on a mixture: routed and recorded teachers, resuming, and what is said of its sources."""

import json
import shutil

import pytest
import torch

import limbeck
from limbeck.errors import ConfigError
from limbeck.experiment import load
from tests.experiment.recordings import from_store, record, recording_recipe
from tests.experiment.tiny_run import steps_of, write_model, write_recipe, write_texts
from tests.tokenizers.small import small


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def mixed(folder, path):
    """The recipe on two texts: `code`, of few documents and most weight, and `chat`."""
    write_texts(folder / "code.jsonl", 6, seed=3)
    write_texts(folder / "chat.jsonl", 40, seed=4)
    recipe = json.loads(path.read_text())
    texts = [
        {"path": str(folder / "code.jsonl"), "weight": 4},
        {"path": str(folder / "chat.jsonl")},
    ]
    recipe["data"] = {"mix": texts, "sequence_length": 32}
    path.write_text(json.dumps(recipe))
    return path


def run(path, *overrides, **options):
    with limbeck.assemble(load(path, overrides)) as whole:
        return whole.train(**options)


def test_a_run_on_a_mixture_resumes_to_the_same_bits_and_only_with_the_same_weights(tmp_path):
    path = mixed(tmp_path, write_recipe(tmp_path, evaluate={"data": None}))
    student = run(path).student
    body, losses = (student / "model.safetensors").read_bytes(), steps_of(tmp_path / "run")
    (tmp_path / "run" / "scores.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.mix\[0\]\.weight: was 4\.0, is 3\.0"):
        run(path, "data.mix[0].weight=3", resume=True)
    shutil.rmtree(student)
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    assert (run(path, resume=True).student / "model.safetensors").read_bytes() == body
    assert steps_of(tmp_path / "run")[-1]["loss"] == losses[-1]["loss"]
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["data"]["sources"].keys() == {"code", "chat"}


def test_sources_that_are_repeated_while_others_are_cut_short_are_named(tmp_path):
    path = mixed(tmp_path, write_recipe(tmp_path, evaluate={"data": None}))
    with limbeck.assemble(load(path, ["optim.steps=50"])) as whole:
        notes = [n for n in whole.parts.notes if "ixture" in n]
    assert [note.split(";")[0] for note in notes[:2]] == [
        "Mixture: code gives 80.0% of the trained tokens",
        "Mixture: chat gives 20.0% of the trained tokens",
    ]
    assert notes[2].startswith("Warning: the mixture reads code (")
    assert "only a part of chat (" in notes[2]
    with limbeck.assemble(load(path, ["optim.steps=2"])) as whole:
        assert not [n for n in whole.parts.notes if n.startswith("Warning")]


def test_a_routed_teacher_takes_the_sources_of_a_mixture_by_name(tmp_path):
    path = mixed(tmp_path, write_recipe(tmp_path))
    write_model(tmp_path / "other", rows=len(small()), seed=5)
    (tmp_path / "held").mkdir()
    for name, seed in (("code", 7), ("chat", 8)):
        write_texts(tmp_path / "held" / f"{name}.jsonl", 4, seed=seed)
    recipe = json.loads(path.read_text())
    online = [{"type": "online", "path": str(tmp_path / each)} for each in ("teacher", "other")]
    recipe["teacher"] = {
        "type": "routed",
        "teachers": dict(zip(("code", "chat"), online, strict=True)),
    }
    recipe["student"] = {"type": "pretrained", "path": str(tmp_path / "other")}
    recipe["evaluate"]["data"] = str(tmp_path / "held")
    path.write_text(json.dumps(recipe))
    with limbeck.assemble(load(path)) as whole:
        data, teacher = whole.parts.data, whole.parts.teacher
    for source in data.sources:
        batch = data.batch(range(source.first_row, source.first_row + 2))
        found = teacher.signal(batch).distribution
        wanted = teacher._members[source.name].signal(batch).distribution
        assert torch.equal(found.hidden, wanted.hidden)


def test_a_recording_of_a_mixture_serves_any_weights_of_its_sources(tmp_path):
    form = {"type": "top_k", "k": 4, "temperatures": [2.0, 1.0]}
    path = mixed(tmp_path, recording_recipe(tmp_path, form, evaluate={"data": None}))
    record(load(path))
    with limbeck.assemble(load(path, [*from_store(tmp_path), "data.mix[0].weight=0.5"])) as whole:
        batch = whole.parts.data.batch(range(2))
        assert whole.parts.teacher.signal(batch).distribution is not None


def test_text_written_during_a_run_needs_one_text(tmp_path):
    path = mixed(tmp_path, write_recipe(tmp_path, objective={"alpha": 1.0}))
    with pytest.raises(ConfigError, match=r"data\.mix: .* `rollout` draws its prompts"):
        load(path, ["rollout={tokens: 4}"])


def test_every_missing_text_of_a_mixture_is_named_at_once(tmp_path):
    path = mixed(tmp_path, write_recipe(tmp_path))
    gone = [f"data.mix[{i}].path={tmp_path / f'no-{i}.jsonl'}" for i in (0, 1)]
    with pytest.raises(ConfigError) as error:
        limbeck.assemble(load(path, gone))
    assert "data.mix[0].path: " in str(error.value)
    assert "data.mix[1].path: " in str(error.value)
