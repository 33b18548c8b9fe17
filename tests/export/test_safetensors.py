"""A folder in 16 bits is the student, rounded; a damaged one is not published."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.errors import DataError
from limbeck.export import export_student, exporters, open_student
from limbeck.export.safetensors import Safetensors
from limbeck.models import save
from tests.export.tiny_students import folder_with, text_in


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("quantize", ["bf16", "f16", "f32"])
def test_a_folder_holds_the_student_in_the_format(quantize, tmp_path):
    student, output = open_student(folder_with(tmp_path / "student")), tmp_path / "out"
    exporter = exporters.bind({"type": "safetensors", "quantize": quantize}, "export")()
    report = export_student(exporter, student, output, text_in(tmp_path))
    made = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    own = student.model.hf_model.state_dict()
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, own[name].to(weight.dtype))
    wanted = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[quantize]
    assert made.dtype == wanted
    parity = report["parity"]
    assert (parity["mean_kl"] < 1e-12) == (quantize == "f32")
    assert report["bytes"] == (output / "model.safetensors").stat().st_size
    assert json.loads((output / "parity.json").read_text())["file"] == "model.safetensors"


def test_large_weights_are_cut_into_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "MAX_SHARD", "20KB")
    student, output = open_student(folder_with(tmp_path / "student")), tmp_path / "out"
    report = export_student(Safetensors(), student, output, text_in(tmp_path))
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 1
    assert report["file"] == "model.safetensors.index.json"
    index = output / report["file"]
    assert report["bytes"] == sum(each.stat().st_size for each in [index, *files])


def test_a_folder_that_differs_from_its_student_is_not_published(tmp_path):
    class Wrong(Safetensors):
        def export(self, student, tokenizer, path):
            norm = student.hf_model.model.norm.weight
            with torch.no_grad():
                norm.mul_(2)
                file = super().export(student, tokenizer, path)
                norm.div_(2)
            return file

    student = open_student(folder_with(tmp_path / "student"))
    with pytest.raises(DataError, match="KL"):
        export_student(Wrong(), student, tmp_path / "out", text_in(tmp_path))
    assert not (tmp_path / "out").exists()
