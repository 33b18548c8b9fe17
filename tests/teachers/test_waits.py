"""A micro-batch waits for its device with no kind of teacher; served ones are tested elsewhere."""

from contextlib import nullcontext

import pytest
import torch

import limbeck
from limbeck.config import ObjectiveConfig
from limbeck.distributed import World
from limbeck.experiment import load
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller, attention
from limbeck.store import Store
from limbeck.teachers import DISTRIBUTION, LocalTeacher, TeacherRequest
from limbeck.teachers.cross_tokenizer import CrossTokenizerTeacher
from limbeck.teachers.stored import StoredTeacher
from tests.experiment.recordings import recorded
from tests.models.tiny import VOCABULARY, random_batch, tiny_llama
from tests.teachers.test_cross_tokenizer import TEXTS, local, packed_batch
from tests.teachers.waits import BlockingCopies
from tests.tokenizers.small import backend, small, wrap

META = torch.device("meta")
FORMS = {"hidden": {"type": "hidden"}, "top_k": {"type": "top_k", "k": 8, "temperatures": [1.0]}}
kinds = pytest.mark.parametrize("kind", ["local", "cross_tokenizer", *FORMS])


@pytest.fixture
def on_meta(monkeypatch):
    """What the meta device lacks."""
    monkeypatch.setattr(attention, "has_varlen", lambda device, *_: device == META)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())


def moved(model, device):
    model.to(device, torch.bfloat16).device = device
    return model


def teacher_of(kind, device, folder):
    """A teacher, a batch that it knows, and the student's vocabulary."""
    if kind == "local":
        model = moved(tiny_llama(2, 32), device)
        return LocalTeacher(model), random_batch(), VOCABULARY
    if kind == "cross_tokenizer":
        ours, plain = small(), local(wrap(backend(290)))
        moved(plain.model, device)
        teacher = CrossTokenizerTeacher(plain, World(0, 1, device))
        teacher.require(TeacherRequest(needs=DISTRIBUTION, student_tokenizer=ours))
        return teacher, packed_batch(ours, TEXTS), len(ours)
    with limbeck.assemble(load(recorded(folder, FORMS[kind]))) as run:
        batch = run.parts.data.batch([0, 1])
    store = Store.open(folder / "store")
    return StoredTeacher(store, device), batch, store.header.vocabulary_size


def micro_batches(kind, device, folder):
    """A function that runs a micro-batch."""
    teacher, batch, vocabulary = teacher_of(kind, device, folder)
    shapes = PairShapes(2, 2, 32, 32, LayerMap.uniform(2, 2))
    objective = build_objective(ObjectiveConfig(alpha=0.5), shapes, head_budget_mb="auto")
    student = moved(tiny_llama(2, 32, vocabulary), device)
    distiller = Distiller(student, objective.to(device))
    tokens = torch.tensor(5, device=device)

    def run() -> None:
        there = batch.to(device)
        loss, _ = distiller(there, teacher.signal(there), tokens)
        loss.backward()

    return run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@kinds
def test_nothing_is_copied_that_the_host_waits_for(kind, on_meta, tmp_path):
    run = micro_batches(kind, META, tmp_path)
    with BlockingCopies() as copies:
        run()
    assert copies.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@kinds
def test_a_second_micro_batch_waits_for_no_gpu(kind, tmp_path):
    run = micro_batches(kind, torch.device("cuda"), tmp_path)
    run()  # compiles kernels, and compares those of attention
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
