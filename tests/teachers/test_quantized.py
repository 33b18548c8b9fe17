"""Teachers whose blocks are kept in 8 or 4 bits."""

import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.distributed.tensor import DTensor

from limbeck.config import ObjectiveConfig, OptimConfig
from limbeck.distributed import shard
from limbeck.errors import ConfigError
from limbeck.experiment import assemble, load
from limbeck.losses import SignalNeeds
from limbeck.models import quantized, save_student
from limbeck.teachers import LocalTeacher, TeacherRequest, teachers
from limbeck.train import make_optimizers, train_step
from tests.commands.test_check import run as check
from tests.distributed.processes import on_ranks
from tests.experiment.tiny_run import write_recipe
from tests.models.tiny import random_batch, tiny_model, tiny_tokenizer
from tests.train.toy import ALONE, ToyBatches, toy_pair

needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs limbeck[quantized]"
)
STUDENT = {"type": "random", "layers": 1, "width": 16, "heads": 2, "kv_heads": 2}


def recipe(folder, quantize="8bit", student=STUDENT):
    path = write_recipe(folder, teacher={"quantize": quantize})
    tree = json.loads(path.read_text())
    tree["student"] = student
    path.write_text(json.dumps(tree))
    return path


@needs_library
@pytest.mark.parametrize(("bits", "share", "far"), [("8bit", 0.3, 0.1), ("4bit", 0.2, 0.7)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_quantised_model_is_smaller_and_near_the_whole_one(family, bits, share, far):
    whole, batch = tiny_model(family, width=64), random_batch()
    model = quantized(tiny_model(family, width=64), bits, torch.device("cpu"))
    assert torch.equal(model.head.weight, whole.head.weight), "the head stays as it is"
    linear = [p for p in model.blocks.parameters() if p.ndim == 2]
    before = sum(p.nbytes for p in whole.blocks.parameters() if p.ndim == 2)
    assert sum(p.nbytes for p in linear) < share * before
    assert not any(p.requires_grad for p in linear)
    teacher, reference = LocalTeacher(model), LocalTeacher(whole)
    for each in (teacher, reference):
        each.require(TeacherRequest(needs=SignalNeeds(distribution=True, layers=frozenset({1}))))
    signal, wanted = teacher.signal(batch), reference.signal(batch)
    for found, exact in (
        (signal.layer_hidden[1], wanted.layer_hidden[1]),
        (signal.distribution.hidden, wanted.distribution.hidden),
    ):
        assert found.dtype == exact.dtype
        assert 0 < (found - exact).norm() / exact.norm() < far


@needs_library
def test_a_family_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match=r"blocks of a gpt2 model have no linear layers"):
        quantized(tiny_model("gpt2"), "8bit", torch.device("cpu"))


@needs_library
def test_a_device_that_the_library_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"computes on cpu and cuda, and the device is mps"):
        quantized(tiny_model("llama"), "8bit", torch.device("mps"))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'limbeck\[quantized\]'"):
        quantized(tiny_model("llama"), "8bit", torch.device("cpu"))


@needs_library
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_student_of_a_quantised_teacher_trains(bits, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    with assemble(load(recipe(tmp_path, bits), ["optim.steps=2", "evaluate.data=null"])) as done:
        outcome = done.train()
        facts = done.parts.teacher.info
    assert (outcome.student / "model.safetensors").exists()
    assert facts.quantized == bits
    assert any(note.startswith(f"teacher: quantised to {bits}") for note in done.parts.notes)


def step_of(world, rows, file, bits):
    """Losses and gradient norm of a step whose teacher is quantised."""
    distiller, plain = toy_pair(ObjectiveConfig())
    model = quantized(plain.model, bits, torch.device("cpu"))
    teacher = LocalTeacher(model, whole=lambda: plain.model)
    teacher.shard(world)
    assert not any(isinstance(p, DTensor) for p in model.parameters()), "whole on each rank"
    shard(distiller, distiller.student.blocks, world)
    optimizers = make_optimizers(
        distiller, OptimConfig(learning_rate=0.01, steps=1), 0.01, world.device
    )
    batches = [ToyBatches().batch(rows[world.rank])]
    outcome = train_step(distiller, teacher, optimizers, batches, world)
    if world.is_main:
        file.write_text(json.dumps([outcome.loss, outcome.grad_norm]))


@needs_library
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_two_ranks_with_a_quantised_teacher_take_the_step_of_one_process(bits, tmp_path):
    on_ranks(2, step_of, [[0, 1], [2]], tmp_path / "ranks", bits)
    step_of(ALONE, [[0, 1, 2]], tmp_path / "alone", bits)
    ranks, alone = (json.loads((tmp_path / name).read_text()) for name in ("ranks", "alone"))
    assert ranks == pytest.approx(alone, rel=1e-5)


def test_without_the_library_no_model_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    make = teachers.bind({"type": "online", "path": "nowhere", "quantize": "8bit"}, "teacher")
    with pytest.raises(ConfigError, match=r"pip install 'limbeck\[quantized\]'"):
        make(ALONE)


@needs_library
def test_check_shows_what_quantising_costs(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    told = json.loads(check(recipe(tmp_path, "4bit"), "--json"))
    (proof,) = [p for p in told["proofs"] if p["name"] == "quantised teacher reads as before"]
    assert "perplexity" in proof["found"]
    before, after = map(float, re.findall(r"[\d.]+(?= before| after)", proof["found"]))
    assert before != after
    whole = json.loads(check(recipe(tmp_path, None), "--json"))
    assert told["plan"]["parameters"] == whole["plan"]["parameters"]


@pytest.mark.parametrize(
    ("student", "changes", "told"),
    [
        ({"type": "depth", "keep": 2}, [], "teacher.quantize: a depth student is made from"),
        ({"type": "width", "hidden": 16}, [], "teacher.quantize: a width student is made from"),
        ({"type": "copy"}, [], "teacher.quantize: a copy student is made from"),
        ({"type": "shared"}, ["trainable.lora={}"], "teacher.quantize: a shared student is made"),
        (STUDENT, ["parallel.teacher=offload"], "parallel.teacher: must not be offload with"),
        (STUDENT, ["teacher.quantize=2bit"], "teacher.quantize: Input should be '8bit' or '4bit'"),
    ],
)
def test_what_a_quantised_teacher_cannot_do_is_refused(student, changes, told, tmp_path):
    with pytest.raises(ConfigError) as refused:
        load(recipe(tmp_path, student=student), changes)
    assert told in str(refused.value)


def test_a_plan_for_a_cluster_refuses_to_quantise(tmp_path):
    save_student(tiny_model("llama"), tiny_tokenizer(), tmp_path)
    make = teachers.bind({"type": "online", "path": str(tmp_path), "quantize": "4bit"}, "teacher")
    with pytest.raises(ConfigError, match=r"teacher\.quantize: a plan for a cluster reads no"):
        make(replace(ALONE, simulated=True))
