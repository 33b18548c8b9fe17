"""`limbeck shrink` from a folder to a folder, and from there into a run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.errors import ConfigError, DataError
from limbeck.files import manifest
from limbeck.initialisers import Origin, initialisers
from limbeck.initialisers.provenance import read_provenance
from limbeck.layers import LayerMap
from limbeck.models import ModelSource, load_model, model_facts, num_parameters
from limbeck.recipe import shrinking
from tests.recipe.house import write_model, write_texts
from tests.tokenizers.small import small

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    teacher = write_model(tmp_path / "teacher", rows=len(small()), layers=5)
    text = write_texts(tmp_path / "train.jsonl", 40, 1)
    return shrinking.open_bench(
        ModelSource(str(teacher)), kind="text", data=str(text), tokens=64, device=CPU
    )


def depth(**options):
    return {"type": "depth", "calibration_tokens": 64, **options}


def test_a_shrunk_folder_is_an_ordinary_model_that_says_where_it_is_from(bench, tmp_path):
    found = shrinking.shrink(bench, depth(keep=3, by="loss"))
    folder = tmp_path / "student"
    shrinking.save_shrunk(bench, found, folder)
    assert manifest(folder) is not None, "published whole"
    kept = found.student.facts["layers_kept"]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, found.student.model.hf_model(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == bench.tokenizer.get_vocab()
    told = read_provenance(str(folder))
    assert told["made"]["layers_kept"] == kept
    facts = model_facts(bench.source, bench.teacher)
    assert told["teacher"]["weights_sha256"] == facts["weights_sha256"]
    assert [each["layer"] for each in found.importance] == [0, 1, 2, 3, 4]
    assert {each["by"] for each in found.candidates} == {"even", "block_influence", "span", "loss"}
    by_loss = next(each for each in found.candidates if each["by"] == "loss")
    assert by_loss["forward_kl"] == pytest.approx(found.cost.forward_kl, rel=1e-5)
    assert (folder / "importance.svg").read_text().count("<svg") == 1
    assert json.loads((folder / "importance.json").read_text())["made"]["layers_kept"] == kept


def test_a_run_maps_a_shrunk_student_to_the_layers_it_kept(bench, tmp_path):
    found = shrinking.shrink(bench, depth(layers=[0, 1, 4]))
    shrinking.save_shrunk(bench, found, tmp_path / "student")
    make = initialisers.bind({"type": "pretrained", "path": str(tmp_path / "student")}, "student")
    student = make(Origin(bench.teacher, bench.tokenizer, CPU))
    assert student.layer_map == LayerMap(((0, 0), (1, 1), (2, 4)))
    assert student.facts["shrunk"]["made"]["layers_kept"] == [0, 1, 4]
    assert "kept" not in student.facts["shrunk"], "too long for a report"
    other = load_model(
        ModelSource(str(write_model(tmp_path / "other", rows=len(small()), layers=3))),
        device=CPU,
        dtype=torch.float32,
    )
    assert make(Origin(other, bench.tokenizer, CPU)).layer_map == LayerMap.uniform(3, 3)


@pytest.mark.parametrize("text", ["{", "[]", '{"made": {"layers_kept": ["x"]}}'])
def test_damaged_provenance_is_told(text, tmp_path):
    (tmp_path / "limbeck.json").write_text(text)
    with pytest.raises(DataError, match="must say what the student was cut out of"):
        read_provenance(str(tmp_path))


def test_a_plan_proposes_three_shapes_nearest_first(bench):
    target = round(0.75 * bench.teacher.num_parameters)
    found = shrinking.plan(bench, target, "loss")
    assert {each["shape"] for each in found} == set(shrinking.SHAPES)
    costs = [each["forward_kl"] for each in found]
    assert costs == sorted(costs)
    for each in found:
        assert each["parameters"] <= target
        assert each["bytes"] == 4 * each["parameters"]
        assert each["tokens_per_second"] > 0
    deep = next(each for each in found if each["shape"] == "depth")
    alone = bench.make(depth(keep=deep["layers"], by="loss"))
    assert alone.facts["layers_kept"] == deep["layers_kept"], (
        "going on from a choice is that choice"
    )


def test_a_plan_without_any_shape_is_refused(bench):
    with pytest.raises(ConfigError, match="embeddings alone are too many"):
        shrinking.plan(bench, 1000, "even")


def test_width_is_saved_with_what_it_kept(bench, tmp_path):
    found = shrinking.shrink(bench, {"type": "width", "intermediate": 40, "layers": [0, 2, 3]})
    shrinking.save_shrunk(bench, found, tmp_path / "student")
    whole = json.loads((tmp_path / "student" / "limbeck.json").read_text())
    assert [len(units) for units in whole["kept"]["inner"]] == [40, 40, 40]
    assert found.student.model.num_parameters == num_parameters(found.student.model.config)


def test_text_that_is_too_short_is_refused(bench):
    with pytest.raises(ConfigError, match=r"must have at least 2,000,000 tokens"):
        shrinking.calibrate(bench.teacher, bench.text, 1_000_000, held_out=True)
