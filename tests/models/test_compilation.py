import inspect
from itertools import product

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

from limbeck.batch import Batch
from limbeck.config.trainable import TrainableConfig
from limbeck.errors import ConfigError
from limbeck.models import (
    checkpoint_activations,
    compilation,
    compile_blocks,
    compiles,
    make_trainable,
    rounds_weights,
)
from tests.models.test_attention import packed_batch, window
from tests.models.test_causal_lm import gradients, random_batch
from tests.models.tiny import tiny_llama, tiny_model

CPU = torch.device("cpu")
INDUCTOR = pytest.param("inductor", marks=pytest.mark.long)  # g++ takes half a minute


@pytest.fixture(autouse=True, params=["aot_eager", INDUCTOR])
def backend(request, monkeypatch):
    """The same capture and the same backward pass, with and without code from g++."""
    monkeypatch.setattr(compilation, "BACKEND", request.param)
    compilation.compiler_problem.cache_clear()
    torch.compiler.reset()
    counters.clear()
    yield request.param
    compilation.compiler_problem.cache_clear()


@pytest.mark.parametrize(
    ("family", "how"), [("llama", "none"), ("gemma2", "full"), ("gpt_neox", "none")]
)
def test_compiled_blocks_have_the_gradients_and_names_of_plain_ones(family, how):
    model, batch = tiny_model(family, layers=3).double().train(), random_batch()
    plain, names = gradients(model, batch), list(model.state_dict())
    checkpoint_activations(model, how)
    compile_blocks(model)
    torch.testing.assert_close(gradients(model, batch), plain, rtol=1e-9, atol=1e-9)
    assert list(model.state_dict()) == names


def test_documents_of_a_packed_row_stay_apart():
    model, batch = tiny_model("llama", layers=2).double().train(), packed_batch()
    plain = gradients(model, batch)
    compile_blocks(model)
    torch.testing.assert_close(gradients(model, batch), plain, rtol=1e-9, atol=1e-9)


def test_blocks_share_their_code_and_other_lengths_add_one_version():
    model = tiny_model("llama", layers=6)
    compile_blocks(model)
    compile_blocks(model)  # changes nothing
    with torch.no_grad():
        model(random_batch())
        first = counters["stats"]["unique_graphs"]
        for length in (3, 4):
            model(random_batch().part(slice(None), slice(length)))
    assert first <= 4, "what is before and after attention, of 6 blocks"
    assert counters["stats"]["unique_graphs"] <= 2 * first


def rows_of(documents, rows=1, length=12):
    sizes = [length // documents] * documents
    return Batch.packed([[window(size, i) for i, size in enumerate(sizes)] for _ in range(rows)])


def versions(model):
    """Of the code of its blocks."""
    forward = inspect.unwrap(type(model.blocks[0]).forward)
    return len(_debug_get_cache_entry_list(forward.__code__))


def test_other_numbers_of_documents_add_no_version():
    model = tiny_model("llama", layers=1)
    compile_blocks(model)
    found = []
    with torch.no_grad():
        for documents in (2, 3, 4, 6):
            model(rows_of(documents))
            found.append(versions(model))
    assert found == [1, 1, 1, 1]


@pytest.mark.slow
def test_a_family_is_compiled_in_every_way_a_run_needs(backend, monkeypatch):
    """Student and teacher, in training and evaluation, for one row or more, of any length."""
    if backend == "inductor":
        pytest.skip("what is captured does not depend on it")
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    student, teacher = tiny_llama(1, 32), tiny_llama(1, 64)
    for model in (student, teacher):
        compile_blocks(model)
    for _ in range(2):
        before = versions(student)
        for rows, documents, length in product((1, 2), (1, 2), (12, 14)):
            batch = rows_of(documents, rows, length)
            with torch.no_grad():
                teacher(batch)
                student(batch)
            student(batch)[0].sum().backward()
    assert versions(student) == before, "the second time all are there"
    assert 8 < before < compilation.VERSIONS


def test_generation_runs_uncompiled_and_writes_the_same_tokens():
    model = tiny_model("llama")
    plain = model.generate([1, 2, 3], 8)
    compile_blocks(model)
    assert model.generate([1, 2, 3], 8) == plain


@pytest.mark.parametrize(
    ("device", "setting", "expected"),
    [("cpu", "auto", False), ("cpu", False, False), ("cpu", True, True), ("cuda", False, False)],
)
def test_a_cpu_compiles_only_where_it_is_asked_to(device, setting, expected):
    there = torch.device(device)
    assert compiles(setting, there, "none", reads_projections=False) is expected


def test_what_cannot_be_compiled_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="selective"):
        compiles(True, CPU, "selective", reads_projections=False)
    with pytest.raises(ConfigError, match="queries, keys or values"):
        compiles(True, CPU, "none", reads_projections=True)
    rounding = tiny_model("llama")
    make_trainable(rounding, TrainableConfig(quantize="q4_0"), 0)
    options = {"reads_projections": False, "rounds_weights": rounds_weights(rounding)}
    with pytest.raises(ConfigError, match=r"rounding of weights that trainable\.quantize"):
        compiles(True, CPU, "none", **options)
