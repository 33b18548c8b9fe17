"""An ExecuTorch program is the student in its runtime; one that is not is not published."""

import importlib.util
import json
import sys

import pytest
import torch

from limbeck.commands.export import export
from limbeck.errors import ConfigError, DataError
from limbeck.export import export_student, exporters, open_student
from limbeck.export.executorch import Executorch
from limbeck.export.few_bits import linear_layers, quantise
from limbeck.export.traced import plain_model
from tests.export.tiny_students import exported, folder_with, made, parity_of, ready, text_in

pytestmark = pytest.mark.slow


def needs_executorch(test):
    """A test that `make test-long` runs, which installs the extra."""
    absent = importlib.util.find_spec("executorch") is None
    reason = "needs pip install 'limbeck[executorch]', which make test-long does"
    return pytest.mark.long(pytest.mark.skipif(absent, reason=reason)(test))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A student, and the folder of its file."""
    folder = tmp_path_factory.mktemp("executorch")
    student = open_student(folder_with(folder / "student", layers=1))
    (folder / "out").mkdir()
    path = folder / "out" / "student.pte"
    return student, Executorch().export(student.model, student.tokenizer, path)


def replace(path, tensor, other):
    """Put one tensor's bytes in the place of another's."""
    data, old = path.read_bytes(), tensor.numpy().tobytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, other.contiguous().numpy().tobytes()))


def permuted_keys(path, student):
    """Outputs of the key projection in another order."""
    weight = student.blocks[0].self_attn.k_proj.weight.detach()
    replace(path, weight, weight[[1, 0, *range(2, len(weight))]])


def other_base(path, student):
    """Another base of the rotary embedding."""
    frequencies = student.decoder.rotary_emb.inv_freq
    replace(path, frequencies, frequencies**1.1)


def spaced(path, _student):
    """A tokenizer that puts a space before every text."""
    file = path.with_name("tokenizer.json")
    tree = json.loads(file.read_text())
    tree["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(tree))


def unreadable(path, _student):
    """A file that is cut off."""
    path.write_bytes(path.read_bytes()[:100])


FAULTS = {
    permuted_keys: r"Mean KL to the student is .* First difference: window 0, position \d",
    other_base: r"Mean KL to the student is .* First difference: window \d, position \d",
    spaced: "Tokenisation differs from token",
    unreadable: r"ExecuTorch must load student\.pte, and refuses it: ",
}


@needs_executorch
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_broken_export_is_refused_and_removed(fault, whole, tmp_path):
    student, file = whole
    with pytest.raises(DataError, match=FAULTS[fault]):
        export_student(
            ready(Executorch(), file, fault), student, tmp_path / "out", text_in(tmp_path)
        )
    assert not (tmp_path / "out").exists()


@needs_executorch
def test_what_is_published_has_parity_up_to_the_longest_sequence(whole, tmp_path):
    student, file = whole
    exporter = ready(Executorch(), file)
    report = export_student(exporter, student, tmp_path / "out", text_in(tmp_path))
    assert report["parity"]["mean_kl"] < 1e-8
    assert report["parity"]["long_window"] == 64
    for path in (tmp_path / "out").iterdir():
        for place in (tmp_path, sys.prefix, file.path.parent.parent):
            assert str(place).encode() not in path.read_bytes(), path.name
    with (
        Executorch().run(file) as runtime,
        pytest.raises(DataError, match=r"must read 65 positions with student\.pte, and fails"),
    ):
        runtime.logits(torch.ones(65, dtype=torch.int64).tolist())


@needs_executorch
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_a_familys_logits_agree(family, tmp_path):
    parity = parity_of(made(family, layers=2), tmp_path, Executorch(positions=40))
    assert parity.passed, parity
    assert parity.mean_kl < 1e-8
    assert parity.long_window == 40


WIDE = {"model.layers.0.mlp.down_proj.weight": "8da8w instead of 8da4w"}


@needs_executorch
@pytest.mark.parametrize(
    ("family", "quantize", "fallbacks", "share"),
    # XNNPACK keeps the scales of groups in bfloat16.
    [("llama", "8da8w", {}, 1e-3), ("llama", "8da4w", WIDE, 0.1), ("gpt2", "8da4w", {}, 0.1)],
)
def test_a_program_in_few_bits_is_what_torchao_computes(
    family, quantize, fallbacks, share, tmp_path
):
    more = {"intermediate_size": 144, "tie_word_embeddings": True} if family == "llama" else {}
    student = made(family, layers=1, width=128, initializer_range=0.1, **more)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    ids = list(range(5, 35))
    with exported(student, tmp_path, Executorch(quantize=quantize, positions=40)) as (
        file,
        runtime,
    ):
        found = runtime.logits(ids)
    assert file.path.name == f"tiny-{quantize}.pte"
    in_memory = plain_model(student.model)
    size_bytes = sum(4 * weight.numel() for weight in in_memory.parameters())
    assert file.facts["fallbacks"] == quantise(in_memory, quantize, 32) == fallbacks
    assert len(file.notes) == len(fallbacks)
    with torch.no_grad():
        rounded = in_memory(torch.tensor([ids])).logits[0]
        own = student.model.logits(torch.tensor([ids]))[0, :, : found.shape[1]]
    assert (found - rounded).square().mean() < share * (own - rounded).square().mean()
    assert file.path.stat().st_size < 0.65 * size_bytes
    after = student.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gpt2s_transposed_layers_become_ordinary_ones():
    model = plain_model(made("gpt2").model)
    ids = torch.arange(5, 35)[None]
    expected = model(ids).logits
    assert len(linear_layers(model)) == 2 * 4 + 1
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def test_a_format_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"export\.quantize: .*f32.*8da8w.*8da4w"):
        exporters.bind({"type": "executorch", "quantize": "q4_0"}, "export")


@pytest.mark.parametrize("quantize", ["f32", "8da8w"])
def test_groups_of_a_format_without_groups_are_refused(quantize):
    with pytest.raises(ConfigError, match=rf"group_size belongs to .* 8da4w, got {quantize}"):
        Executorch(quantize=quantize, group_size=64)


def test_more_positions_than_the_student_has_are_refused():
    student = made()
    with pytest.raises(ConfigError, match=r"positions must be at most 64, .* got 65"):
        Executorch(positions=65).require_student(student.model, student.tokenizer)


def test_a_missing_extra_is_named_before_the_student_is_opened(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ConfigError, match=r"cannot be imported.*limbeck\[executorch\]"):
        export(tmp_path / "missing", output=tmp_path / "out", format="executorch")
