"""A recipe's exports: refused before step 0, or published with a verdict; the run stays whole."""

import json
import sys

import pytest

import limbeck
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import load
from limbeck.files import manifest
from tests.experiment.tiny_run import steps_of, write_recipe

ONE = "export=[{type: gguf, quantize: f32}, {type: gguf, quantize: f16, max_kl: 1.0e-12}]"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_a_failed_parity_leaves_the_run_whole_and_the_other_file_published(tmp_path):
    path = write_recipe(tmp_path, optim={"steps": 1, "warmup_steps": 0}, checkpoint={"every": 1})
    with (
        limbeck.assemble(load(path, [ONE])) as run,
        pytest.raises(DataError, match=r"(?s)run is complete.*exports/gguf-f16: .*Mean KL"),
    ):
        run.train()
    folder = tmp_path / "run"
    assert manifest(folder / "student") is not None
    assert manifest(folder / "exports" / "gguf-f32") is not None
    assert not (folder / "exports" / "gguf-f16").exists()
    found = json.loads((folder / "evaluation.json").read_text())
    parity = json.loads((folder / "exports" / "gguf-f32" / "parity.json").read_text())
    assert found["exports"]["gguf-f32"] == parity
    assert found["exports"]["gguf-f16"].keys() == {"failed"}
    assert found["trials"]["distilled"]
    page = (folder / "report.html").read_text()
    assert parity["file"] in page
    assert "not published" in page
    with limbeck.assemble(load(path, ["export=[gguf]"])) as run:
        outcome = run.train(resume=True)
    assert outcome.evaluation["exports"].keys() == {"gguf-f16"}
    assert len(steps_of(folder)) == 1


def test_exports_that_cannot_work_are_refused_before_step_0(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    for override, message in (
        ("export=[{type: gguf, quantize: q4}]", r"export\[0\]\.quantize: .*got 'q4'"),
        ("export=[onyx]", r"export\[0\]\.type: no export format is called 'onyx'"),
        ("export=[gguf, {type: gguf, quantize: f16}]", r"export\[1\]: .* gguf-f16 twice"),
        ("export=[onnx, onnx]", r"export\[1\]: .* onnx twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            limbeck.assemble(load(path, [override]))
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    unknown = {**config, "hidden_act": "gelu_pytorch_tanh"}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(ConfigError, match=r"llama\.cpp computes a llama model with"):
        limbeck.assemble(load(path, ["export=[gguf]"]))
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"limbeck\[onnx\]"):
        limbeck.assemble(load(path, ["export=[onnx]"]))
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError, match=r"limbeck\[export\]"):
        limbeck.assemble(load(path, ["export=[gguf]"]))
    assert not (tmp_path / "run").exists()
