"""Several held-out texts by name: each is measured, one of them chooses."""

import json

import pytest

import limbeck
from limbeck.data import held_out_configs
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import load
from limbeck.experiment.score_files import read_scores
from tests.experiment.recordings import from_store, record, recording_recipe
from tests.experiment.tiny_run import write_recipe, write_texts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def recipe_of_two(folder, path=None, **options):
    """Held-out texts `near` and `far`."""
    path = path or write_recipe(folder)
    for name, seed in (("near", 5), ("far", 6)):
        write_texts(folder / f"{name}.jsonl", 8, seed=seed)
    recipe = json.loads(path.read_text())
    recipe["evaluate"]["data"] = {name: str(folder / f"{name}.jsonl") for name in ("near", "far")}
    recipe["evaluate"] |= {"continuations": 0, **options}
    path.write_text(json.dumps(recipe))
    return path


def test_every_text_is_measured_as_if_it_were_the_only_one(tmp_path):
    path = recipe_of_two(tmp_path)
    with limbeck.assemble(load(path, ["optim.steps=2", "optim.warmup_steps=0"])) as whole:
        found = whole.train().evaluation
    assert found["chosen_by_set"] == "near"
    assert found["sets"]["near"]["trials"] == found["trials"]
    values = {
        n: found["sets"][n]["trials"]["distilled"]["forward_kl"]["value"] for n in ("near", "far")
    }
    assert values["near"] != values["far"]
    for name, value in values.items():
        alone = [f"evaluate.data={tmp_path / name}.jsonl"]
        with limbeck.assemble(load(path, alone)) as whole:
            again = whole.evaluate(tmp_path / "run" / "student")["trials"]["distilled"]
        assert again["forward_kl"]["value"] == pytest.approx(value, rel=1e-6)
    with limbeck.assemble(load(path)) as whole:
        again = whole.evaluate(tmp_path / "run" / "student")["sets"]
    for name, value in values.items():
        measured = again[name]["trials"]["distilled"]["forward_kl"]["value"]
        assert measured == pytest.approx(value, rel=1e-6)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    validation = read_scores(tmp_path / "run" / "scores.json").validation
    assert last["forward_kl"] == pytest.approx(validation.mean("forward_kl"))
    assert last["far/forward_kl"] not in (None, last["forward_kl"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Each held-out text" in page
    for name in values:
        assert f'<th scope="row">{name}</th>' in page
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["held_out"] == provenance["held_out_sets"]["near"]
    assert provenance["held_out_sets"].keys() == {"near", "far"}


def test_the_first_text_chooses_or_the_one_that_is_named(tmp_path):
    path = recipe_of_two(tmp_path)
    assert list(held_out_configs(load(path))) == ["near", "far"]
    assert list(held_out_configs(load(path, ["evaluate.choose_by=far"]))) == ["far", "near"]


def test_a_recording_covers_every_held_out_text(tmp_path):
    form = {"type": "top_k", "k": 4, "temperatures": [2.0, 1.0]}
    path = recipe_of_two(tmp_path, recording_recipe(tmp_path, form))
    record(load(path))
    with limbeck.assemble(load(path, from_store(tmp_path))) as whole:
        assert list(whole.parts.held_out_sets) == ["near", "far"]
    write_texts(tmp_path / "far.jsonl", 8, seed=9)
    with pytest.raises(DataError, match=r"evaluate\.data\.far: every window must be in the store"):
        limbeck.assemble(load(path, from_store(tmp_path)))


def test_beside_a_mixture_a_text_is_read_as_the_source_of_its_name(tmp_path):
    path = recipe_of_two(tmp_path)
    texts = [
        {"path": "a.jsonl", "name": "near", "columns": {"text": "body"}, "type": "text"},
        {"path": "org/name", "subset": "en", "revision": "v1"},
    ]
    recipe = json.loads(path.read_text())
    recipe["data"] = {"mix": texts, "sequence_length": 32}
    recipe["evaluate"]["data"] |= {"name": "org/name"}
    path.write_text(json.dumps(recipe))
    found = held_out_configs(load(path))
    assert [dict(each.columns) for each in found.values()] == [{"text": "body"}, {}, {}]
    assert [each.type for each in found.values()] == ["text", "auto", "auto"]
    assert [(each.subset, each.revision) for each in found.values()][1:] == [
        (None, None),
        ("en", "v1"),
    ]
    assert all(not each.mix and not each.pack for each in found.values())
    assert found["name"].split == "test"
    other = held_out_configs(load(path, ["evaluate.subset=de"]))
    assert other["name"].subset == "de"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluate.choose_by=fra"], r"evaluate\.choose_by: .* \(near, far\), got 'fra'"),
        (["evaluate.data=x.jsonl", "evaluate.choose_by=far"], r"choose_by: .*none has a name"),
        (["evaluate.data={}"], r"evaluate\.data: must name held-out text"),
        (
            [
                "data={path: org/name, streaming: true, max_documents: 9, sequence_length: 32}",
                "evaluate.data=org/name",
            ],
            r"evaluate\.max_documents: must say how many rows",
        ),
        (["evaluate.data={a/b: x.jsonl}"], r"evaluate\.data: names must be .* got 'a/b'"),
    ],
)
def test_mistakes_in_names_are_answered(tmp_path, overrides, told):
    with pytest.raises(ConfigError, match=told):
        load(recipe_of_two(tmp_path), overrides)


def test_every_missing_text_is_named_by_its_option(tmp_path):
    path = recipe_of_two(tmp_path)
    (tmp_path / "near.jsonl").unlink()
    (tmp_path / "far.jsonl").unlink()
    with pytest.raises(ConfigError) as error:
        limbeck.assemble(load(path))
    assert "evaluate.data.near: " in str(error.value)
    assert "evaluate.data.far: " in str(error.value)
