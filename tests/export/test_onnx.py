"""An ONNX file is the student in ONNX Runtime, and what is not the student is not published."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from limbeck.commands.export import export
from limbeck.config.trainable import LowRankConfig
from limbeck.errors import ConfigError, DataError
from limbeck.export import export_student, open_student
from limbeck.export.onnx import Onnx
from limbeck.files import manifest
from limbeck.models import save_student
from limbeck.models.lora import add_adapters
from tests.export.tiny_students import folder_with, made, parity_of, ready, text_in
from tests.models.tiny import FAMILIES

pytestmark = pytest.mark.slow

KINDS = {"layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
LAYERS = {
    "gemma2": KINDS,
    "gemma3_text": KINDS,
    "cohere2": KINDS,
    "smollm3": {"layers": 2, "no_rope_layers": [1, 0]},
}
"""Layers of each kind that a family has; one layer, which is traced faster, where all are alike."""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A student, and the folder of its file."""
    folder = tmp_path_factory.mktemp("onnx")
    student = open_student(folder_with(folder / "student", layers=1))
    student.model.hf_model.generation_config.eos_token_id = 0
    (folder / "out").mkdir()
    file = Onnx().export(student.model, student.tokenizer, folder / "out" / "student.onnx")
    return student, file


def edit(folder, wanted, change):
    """Change the first tensor of the graph that is wanted by its name or its values."""
    path = folder / "student.onnx"
    model = onnx.load(path)
    arrays = ((t, numpy_helper.to_array(t)) for t in model.graph.initializer)
    tensor, values = next((t, w) for t, w in arrays if wanted(t.name, w))
    tensor.CopyFrom(numpy_helper.from_array(change(values.copy()), tensor.name))
    (folder / "student.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="student.onnx.data")


def edit_json(path, change):
    """Change a JSON file."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def permuted_keys(folder):
    """Outputs of the first layer's key projection in another order."""
    order = [1, 0, *range(2, 16)]
    edit(folder, lambda _, w: w.shape == (32, 16), lambda w: w[:, order])


def other_base(folder):
    """Another base of the rotary embedding."""
    edit(folder, lambda name, _: name.endswith(".inv_freq"), lambda w: w ** np.float32(1.1))


def spaced(folder):
    """A tokenizer that puts a space before every text."""
    edit_json(
        folder / "tokenizer.json",
        lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True),
    )


def no_bos(folder):
    """A tokenizer that does not begin a text with BOS."""
    edit_json(folder / "tokenizer.json", lambda tree: tree.update(post_processor=None))


def other_template(folder):
    """One letter of the chat template is another."""
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "Assistant"))


def no_end(folder):
    """Settings that stop at another token."""
    edit_json(folder / "generation_config.json", lambda tree: tree.update(eos_token_id=5))


def unreadable(folder):
    """A file that is cut off."""
    path = folder / "student.onnx"
    path.write_bytes(path.read_bytes()[:100])


FAULTS = {
    permuted_keys: r"Mean KL to the student is .* First difference: window 0, position \d",
    other_base: r"Mean KL to the student is .* First difference: window \d, position \d",
    spaced: "Tokenisation differs from token",
    no_bos: "A text begins or ends in another way: 'a' is .1, ",
    other_template: "The chat template renders",
    no_end: r"The student ends a text at 0 \('<\|end\|>'\), and the file does not",
    unreadable: r"ONNX Runtime must load student\.onnx, and refuses it: ",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_broken_export_is_refused_and_removed(fault, whole, tmp_path):
    student, file = whole
    with pytest.raises(DataError, match=FAULTS[fault]):
        export_student(
            ready(Onnx(), file, lambda path, _: fault(path.parent)),
            student,
            tmp_path / "out",
            text_in(tmp_path),
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_is_published_has_parity_at_every_length_and_no_path_of_this_machine(whole, tmp_path):
    student, file = whole
    report = export_student(ready(Onnx(), file), student, tmp_path / "out", text_in(tmp_path))
    assert report["parity"]["passed"]
    assert report["parity"]["mean_kl"] < 1e-8
    assert report["parity"]["same_top"] == 1
    assert report["parity"]["long_window"] == 64
    assert manifest(tmp_path / "out") is not None
    parts = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert report["bytes"] == sum(
        parts[n].stat().st_size for n in ("student.onnx", "student.onnx.data")
    )
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"} < set(
        parts
    )
    for path in parts.values():
        for place in (tmp_path, sys.prefix, file.path.parent.parent):
            assert str(place).encode() not in path.read_bytes(), path.name


def test_rows_that_stand_for_no_token_are_left_out(whole):
    student, file = whole
    assert student.model.vocabulary_rows == student.model.vocabulary_size + 3
    with Onnx().run(file) as runtime:
        logits = runtime.logits([1, 5, 9])
        assert logits.shape == (3, student.model.vocabulary_size)
        expected = student.model.logits(torch.tensor([[1, 5, 9]]))[0]
        torch.testing.assert_close(logits, expected)
        with pytest.raises(DataError, match=r"must read 1 positions with student\.onnx, and fails"):
            runtime.logits([student.model.vocabulary_rows])
    assert (
        json.loads((file.path.parent / "config.json").read_text())["vocab_size"] == logits.shape[1]
    )


def test_a_batch_of_padded_rows_has_the_logits_of_the_student(whole):
    import onnxruntime

    student, file = whole
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    assert [each.shape for each in session.get_inputs()] == [["batch", "sequence"]] * 2
    ids = torch.randint(3, 300, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = student.model.hf_model(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(
        torch.from_numpy(found)[real], expected[real][:, : found.shape[2]], atol=1e-4, rtol=1e-4
    )


def test_transformers_opens_and_runs_the_folder(whole):
    from transformers.exporters import ExportedModel

    student, file = whole
    ids = torch.tensor([[1, 5, 9]])
    found = ExportedModel.from_pretrained(file.path.parent)(
        input_ids=ids, attention_mask=torch.ones_like(ids)
    )
    torch.testing.assert_close(found.logits, student.model.logits(ids))


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES if f not in ("llama", "gpt2")),
    ],
)
def test_a_familys_logits_agree(family, tmp_path):
    made_student = made(family, **LAYERS.get(family, {"layers": 1}))
    # As a student is opened: beside a qwen2 config.json transformers changes any tokenizer's rules.
    save_student(made_student.model, made_student.tokenizer, tmp_path / "student")
    (tmp_path / "out").mkdir()
    parity = parity_of(open_student(tmp_path / "student"), tmp_path / "out", Onnx())
    assert parity.passed, parity
    assert parity.mean_kl < 1e-8
    assert parity.long_window == 64


@pytest.mark.long
def test_adapters_are_merged_into_a_tied_student(tmp_path):
    student = made(tie_word_embeddings=True)
    add_adapters(student.model, LowRankConfig(rank=4), seed=0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    assert parity_of(student, tmp_path, Onnx()).passed


def test_what_the_exporter_cannot_trace_is_refused_with_its_reason(tmp_path, monkeypatch):
    student = made()

    def branching(_mlp, hidden):
        return hidden if hidden.sum() > 0 else -hidden

    monkeypatch.setattr(type(student.model.blocks[0].mlp), "forward", branching)
    with pytest.raises(
        ConfigError, match="ONNX exporter must trace this llama student, and cannot"
    ):
        Onnx().export(student.model, student.tokenizer, tmp_path / "tiny.onnx")


def test_a_student_without_a_longest_sequence_is_refused(monkeypatch):
    student = made()
    monkeypatch.setattr(type(student.model), "max_positions", None)
    with pytest.raises(ConfigError, match="must state its longest sequence"):
        Onnx().require_student(student.model, student.tokenizer)


def test_a_missing_extra_is_named_before_the_student_is_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ConfigError, match=r"onnxruntime, which cannot be imported.*limbeck\[onnx\]"
    ):
        export(tmp_path / "missing", output=tmp_path / "out", format="onnx")
    with pytest.raises(ConfigError, match="quantize"):
        export(tmp_path / "missing", output=tmp_path / "out", format="onnx", quantize="q8_0")


def test_a_file_that_is_too_far_is_not_published(whole, tmp_path):
    student, file = whole
    far = ready(Onnx(), file)
    far.max_kl = 1e-20
    with pytest.raises(DataError, match="First difference: window 0, position"):
        export_student(far, student, tmp_path / "out", text_in(tmp_path))
    assert not (tmp_path / "out").exists()
    assert DataError.exit_code == 3
