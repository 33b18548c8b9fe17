"""What is published is the student, and what is not the student is not published."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from limbeck.commands.export import export
from limbeck.errors import ConfigError, DataError
from limbeck.export import export_student, exporters, open_student
from limbeck.export.gguf import Gguf
from limbeck.export.llama_cpp import running
from limbeck.files import manifest
from tests.export.tiny_students import folder_with, text_in
from tests.tokenizers.small import END


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def swap_halves(reader):
    """Rows of one head of one projection, as if they had not been reordered."""
    (tensor,) = (t for t in reader.tensors if t.name == "blk.1.attn_k.weight")
    rows = tensor.data[:8].copy()
    tensor.data[:8] = rows[[0, 2, 4, 6, 1, 3, 5, 7]]


def other_base(reader):
    """Another base of the rotary embedding."""
    reader.get_field("llama.rope.freq_base").parts[-1][0] = 20000.0


def no_bos(reader):
    """A file that does not begin a text with BOS."""
    reader.get_field("tokenizer.ggml.add_bos_token").parts[-1][0] = False


def other_template(reader):
    """One letter of the chat template is another."""
    letters = reader.get_field("tokenizer.chat_template").parts[-1]
    place = bytes(letters).find(b"assistant")
    letters[place] = ord("A")


def other_pre_tokenizer(reader):
    """gpt-2 becomes qwen2, which takes digits one by one."""
    reader.get_field("tokenizer.ggml.pre").parts[-1][:] = list(b"qwen2")


FAULTS = {
    swap_halves: r"Mean KL to the student is .* First difference: window 0, position \d",
    other_base: r"Mean KL to the student is .* First difference: window \d, position \d",
    no_bos: "A text begins or ends in another way: 'a' is .1, ",
    other_template: "The chat template renders",
    other_pre_tokenizer: "Tokenisation differs from token",
}


class Broken(Gguf):
    """Writes a file, and a fault into it."""

    def __init__(self, fault):
        super().__init__(quantize="f16")
        self.fault = fault

    def export(self, student, tokenizer, path):
        file = super().export(student, tokenizer, path)
        reader = GGUFReader(path, "r+")
        self.fault(reader)
        reader.data.flush()
        return file


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_broken_export_is_refused_and_removed(fault, tmp_path):
    student = open_student(folder_with(tmp_path / "student"))
    with pytest.raises(DataError, match=FAULTS[fault]) as error:
        export_student(Broken(fault), student, tmp_path / "out", text_in(tmp_path))
    assert "tiny" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_another_end_token_is_refused(tmp_path):
    def no_end(reader):
        ends = reader.get_field("tokenizer.ggml.eos_token_id").parts[-1]
        ends[0] = 40

    student = open_student(folder_with(tmp_path / "student"))
    with pytest.raises(DataError, match="EOS is token 0 in the student and 40 in the file"):
        export_student(Broken(no_end), student, tmp_path / "out", text_in(tmp_path))


def test_what_llama_cpp_does_not_load_is_an_error(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with (
        pytest.raises(DataError, match=r"must load bad\.gguf, and refuses it"),
        running(tmp_path / "bad.gguf", 8),
    ):
        pass


def test_a_student_is_published_with_parity_and_modelfile(tmp_path, capsys):
    folder_with(tmp_path / "run" / "student")
    data = text_in(tmp_path).path
    export(tmp_path / "run", output=tmp_path / "out", quantize="q8_0", data=data, tokens=200)
    assert "same top token" in capsys.readouterr().out
    assert manifest(tmp_path / "out") is not None
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["file"] == "run-q8_0.gguf"
    assert (tmp_path / "out" / report["file"]).stat().st_size == report["bytes"]
    assert report["parity"]["passed"]
    assert report["parity"]["long_window"] == 64
    assert str(tmp_path) not in json.dumps(report)
    assert report["tensors"] == {"Q8_0": 16, "F32": 5}
    assert (tmp_path / "out" / "Modelfile").read_text().splitlines() == [
        "FROM ./run-q8_0.gguf",
        "PARAMETER num_ctx 64",
        f'PARAMETER stop "{END}"',
    ]


def test_a_file_that_is_too_far_is_not_published(tmp_path):
    folder_with(tmp_path / "student")
    text = text_in(tmp_path)
    with pytest.raises(DataError, match="First difference: window 0, position"):
        export(tmp_path / "student", output=tmp_path / "out", max_kl=1e-12, data=text.path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q3"}, r"export\.quantize: Input should be 'f32', 'f16'"),
        ({"format": "onyx"}, "no export format is called 'onyx'"),
        ({"max_kl": 0.0}, r"export\.max_kl: Input should be greater than 0"),
        ({"output": Path(__file__).parent}, "--output must be new"),
    ],
)
def test_wrong_options_are_refused_before_the_student_is_opened(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "missing", **{"output": tmp_path / "out", **options})


def test_adapters_that_were_not_merged_are_refused(tmp_path):
    folder = folder_with(tmp_path / "student")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="needs its adapters merged"):
        open_student(folder)


def test_padding_of_the_head_is_left_out(tmp_path):
    student = open_student(folder_with(tmp_path / "student"))
    assert student.model.vocabulary_rows == student.model.vocabulary_size + 3
    exporter = exporters.bind({"type": "gguf", "quantize": "f32"}, "export")()
    file = exporter.export(student.model, student.tokenizer, tmp_path / "a.gguf")
    shapes = {t.name: t.shape.tolist() for t in GGUFReader(file.path).tensors}
    assert shapes["output.weight"] == [32, student.model.vocabulary_size]
    with exporter.run(file) as runtime:
        logits = runtime.logits([1, 5, 9])
    assert logits.shape == (3, student.model.vocabulary_size)
    expected = student.model.logits(torch.tensor([[1, 5, 9]]))[0]
    torch.testing.assert_close(logits, expected, atol=0.01, rtol=0.01)


def test_calibration_and_teacher_are_reported(tmp_path, capsys):
    folder_with(tmp_path / "teacher", width=256, num_attention_heads=8, initializer_range=0.05)
    folder_with(tmp_path / "student", seed=1, width=256, num_attention_heads=8, layers=1)
    text = text_in(tmp_path).path
    export(
        tmp_path / "student", output=tmp_path / "out", quantize="q4_k_m", max_kl=9.0, tokens=200,
        data=text, calibration=text, teacher=tmp_path / "teacher", as_json=True,
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["importance_matrix"]
    distance = report["parity"]["teacher_kl"]
    assert distance["student"] > 0.1
    assert abs(distance["student"] - distance["exported"]) > 1e-6
