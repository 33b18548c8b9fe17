"""`limbeck shrink` from a folder to a folder, and from there into a run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.data import corpus_path
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import shrink as shrinking
from limbeck.files import manifest
from limbeck.layer_map import LayerMap
from limbeck.models import (
    ModelSource,
    cache_folder,
    embedded_teacher,
    load_model,
    model_facts,
    save_student,
)
from limbeck.prune.narrow import num_parameters
from limbeck.students import Origin, initialisers
from limbeck.students.provenance import read_provenance
from tests.experiment.tiny_run import write_model, write_recipe, write_texts
from tests.models.tiny import tensors_hash
from tests.tokenizers.small import small
from tests.train.toy import ALONE

CPU = torch.device("cpu")


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    teacher = write_model(tmp_path / "teacher", rows=len(small()), layers=5)
    text = write_texts(tmp_path / "train.jsonl", 40, 1)
    return shrinking.open_shrink(
        ModelSource(str(teacher)), kind="text", data=str(text), tokens=64, device=CPU
    )


def depth(**options):
    return {"type": "depth", "calibration_tokens": 64, **options}


def test_a_shrunk_folder_is_an_ordinary_model_that_says_where_it_is_from(setup, tmp_path):
    found = shrinking.shrink(setup, depth(keep=3, by="loss"))
    folder = tmp_path / "student"
    shrinking.save_shrunk(setup, found, folder)
    assert manifest(folder) is not None, "published whole"
    kept = found.student.facts["layers_kept"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, found.student.model.hf_model(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == setup.tokenizer.get_vocab()
    told = read_provenance(str(folder))
    assert told["made"]["layers_kept"] == kept
    facts = model_facts(setup.source, setup.teacher)
    assert told["teacher"]["weights_sha256"] == facts["weights_sha256"]
    assert str(tmp_path) not in (folder / "limbeck.json").read_text()
    assert [each["layer"] for each in found.importance] == [0, 1, 2, 3, 4]
    assert {each["by"] for each in found.candidates} == {"even", "block_influence", "span", "loss"}
    by_loss = next(each for each in found.candidates if each["by"] == "loss")
    assert by_loss["forward_kl"] == pytest.approx(found.cost.forward_kl, rel=1e-5)
    assert (folder / "importance.svg").read_text().count("<svg") == 1
    assert json.loads((folder / "importance.json").read_text())["made"]["layers_kept"] == kept


def test_a_run_maps_a_shrunk_student_to_the_layers_it_kept(setup, tmp_path):
    found = shrinking.shrink(setup, depth(layers=[0, 1, 4]))
    shrinking.save_shrunk(setup, found, tmp_path / "student")
    make = initialisers.bind({"type": "pretrained", "path": str(tmp_path / "student")}, "student")
    student = make(Origin(setup.teacher, setup.tokenizer, ALONE))
    assert student.layer_map == LayerMap(((0, 0), (1, 1), (2, 4)))
    assert student.facts["shrunk"]["made"]["layers_kept"] == [0, 1, 4]
    assert "kept" not in student.facts["shrunk"], "too long for a report"
    other = load_model(
        ModelSource(str(write_model(tmp_path / "other", rows=len(small()), layers=3))),
        device=CPU,
        dtype=torch.float32,
    )
    assert make(Origin(other, setup.tokenizer, ALONE)).layer_map == LayerMap.uniform(3, 3)
    known = {"layers": setup.teacher.num_layers, "family": setup.teacher.family}
    recorded = Origin(None, setup.tokenizer, ALONE, recorded=known)
    assert make(recorded).layer_map == student.layer_map
    assert make(Origin(None, setup.tokenizer, ALONE)).layer_map == LayerMap(())


@pytest.mark.parametrize("text", ["{", "[]", '{"made": {"layers_kept": ["x"]}}'])
def test_damaged_provenance_is_reported(text, tmp_path):
    (tmp_path / "limbeck.json").write_text(text)
    with pytest.raises(DataError, match="must be as limbeck shrink wrote it"):
        read_provenance(str(tmp_path))


def test_a_plan_proposes_three_shapes_nearest_first(setup):
    target = round(0.75 * setup.teacher.num_parameters)
    found = shrinking.plan(setup, target, "loss")
    assert {each["shape"] for each in found} == set(shrinking.SHAPES)
    costs = [each["forward_kl"] for each in found]
    assert costs == sorted(costs)
    for each in found:
        assert each["parameters"] <= target
        assert each["bytes"] == 4 * each["parameters"]
        assert each["tokens_per_second"] > 0
    deep = next(each for each in found if each["shape"] == "depth")
    alone = setup.make(depth(keep=deep["layers"], by="loss"))
    assert alone.facts["layers_kept"] == deep["layers_kept"], (
        "going on from a choice is that choice"
    )


def test_a_plan_without_any_shape_is_refused(setup):
    with pytest.raises(ConfigError, match="embeddings are too large"):
        shrinking.plan(setup, 1000, "even")


def test_width_is_saved_with_what_it_kept(setup, tmp_path):
    found = shrinking.shrink(setup, {"type": "width", "intermediate": 40, "layers": [0, 2, 3]})
    shrinking.save_shrunk(setup, found, tmp_path / "student")
    whole = json.loads((tmp_path / "student" / "limbeck.json").read_text())
    assert [len(units) for units in whole["kept"]["inner"]] == [40, 40, 40]
    assert found.student.model.num_parameters == num_parameters(found.student.model.config)


def test_text_that_is_too_short_is_refused(setup):
    with pytest.raises(ConfigError, match=r"must have at least 2,000,000 tokens"):
        shrinking.calibrate(setup.teacher, setup.text, 1_000_000, held_out=True)


@pytest.mark.parametrize(
    "student",
    [
        {"type": "depth", "keep": 3, "by": "loss", "calibration_tokens": 64},
        {"type": "width", "keep": 0.8, "calibration_tokens": 64},
    ],
)
def test_a_recipe_measures_its_student_on_its_own_text(student, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    path = write_recipe(tmp_path, optim={"steps": 2, "warmup_steps": 0}, evaluate={"every": 9})
    recipe = json.loads(path.read_text()) | {"student": student}
    path.write_text(json.dumps(recipe))
    with limbeck.assemble(limbeck.load(path)) as run:
        outcome = run.train()
    AutoModelForCausalLM.from_pretrained(outcome.student)
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())["student"]
    assert facts["origin"] == student["type"]


def test_the_report_of_a_shrunk_student_shows_what_it_kept(setup, tmp_path):
    found = shrinking.shrink(setup, depth(layers=[0, 1, 4]))
    shrinking.save_shrunk(setup, found, tmp_path / "student")
    write_texts(tmp_path / "held.jsonl", 12, seed=2)
    path = write_recipe(tmp_path, optim={"steps": 2, "warmup_steps": 0}, evaluate={"every": 9})
    recipe = json.loads(path.read_text())
    recipe["student"] = {"type": "pretrained", "path": str(tmp_path / "student")}
    path.write_text(json.dumps(recipe))
    with limbeck.assemble(limbeck.load(path)) as run:
        outcome = run.train()
    page = outcome.report.read_text()
    facts = model_facts(setup.source, setup.teacher)
    assert facts["weights_sha256"] in page
    assert "shrunk" in page


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("{type: depth, keep: 2, layers: [0, 1]}", "exactly one of layers"),
        ("{type: depth, drop: [1], by: loss}", "drop names them already, got by: loss"),
        ("{type: depth, keep: 2, by: luck}", r"student\.by.*got 'luck'"),
        ("{type: width}", "exactly one of the three, got none"),
        ("{type: width, keep: 0.5, hidden: 16}", "got sizes, keep"),
    ],
)
def test_a_wrong_size_is_refused_before_anything_loads(student, message, tmp_path):
    path = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=message):
        limbeck.load(path, [f"student={student}"])


@pytest.mark.long
def test_smollm2_made_narrow_and_shallow_is_itself_in_plain_transformers(tmp_path):
    source = ModelSource(str(embedded_teacher(cache_folder(), print)))
    teacher = load_model(source, device=CPU, dtype=torch.float32)
    text = str(corpus_path("train"))
    setup = shrinking.open_shrink(source, kind="text", data=text, tokens=256, device=CPU)
    before = tensors_hash(teacher)
    same = setup.make({"type": "width", "keep": 1.0, "calibration_tokens": 256}).model
    assert tensors_hash(same) == before
    spec = {"type": "width", "params": "60M", "layers": 18, "by": "block_influence"}
    made = setup.make({**spec, "calibration_tokens": 256})
    save_student(made.model, made.tokenizer, tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    ids = setup.calibration.batches[0].input_ids[:, :64]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, made.model.hf_model(ids).logits)
    assert 55e6 < plain.num_parameters() <= 60e6
    assert plain.config.num_hidden_layers == 18
