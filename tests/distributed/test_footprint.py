"""A simulated step holds, sends and computes what a real one does, to the byte."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from limbeck.config import DataConfig, MemoryConfig, ObjectiveConfig, OptimConfig, RunConfig
from limbeck.distributed import Footprint, by_purpose, shard, simulated_world, world
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import (
    Distiller,
    ModelSource,
    load_model,
    save_student,
    sketched_model,
)
from limbeck.teachers import LocalTeacher
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.remembering import for_measuring
from limbeck.train import dry_run, train_step
from tests.distributed.processes import live, on_ranks
from tests.models.tiny import random_batch, tiny_llama, tiny_tokenizer
from tests.train.toy import ToyBatches, toy_pair

VOCABULARY, LENGTH, ROWS = 256, 64, 2
STUDENT_LAYERS, TEACHER_LAYERS = 2, 3
CASES = {
    "one rank": (1, {}),
    "two ranks": (2, {}),
    "three micro-batches": (2, {"passes": 3, "dtype": torch.bfloat16}),
    "each reduced": (2, {"passes": 3, "dtype": torch.bfloat16, "reduce": "micro_batch"}),
    "two teachers": (2, {"passes": 3, "dtype": torch.bfloat16, "num_teachers": 2}),
    "checkpointed": (2, {"checkpointing": "full"}),
    "selective": (2, {"checkpointing": "selective"}),
    "reduced at the peak": (
        2,
        {"dtype": torch.bfloat16, "checkpointing": "full", "rows": 1, "length": 4},
    ),
}

REDUCE = ("step", "micro_batch")


def sharded_pair(here, folder, dtype=None, num_teachers=1):
    """Distiller and teacher of a rank, with weights or, in a simulated world, without.

    Several teachers are an ensemble, which runs all of them on all rows.
    """

    def model(name, kind):
        source = ModelSource(str(folder / name))
        if here.simulated:
            return sketched_model(source, kind)
        return load_model(source, device=here.device, dtype=kind)

    student = model("student", torch.float32)
    members = [model("teacher", dtype or torch.float32) for _ in range(num_teachers)]
    teacher = members[0]  # all have its shape
    shapes = PairShapes(
        student.num_layers, teacher.num_layers, student.width, teacher.width, LayerMap(())
    )
    built = build_objective(ObjectiveConfig(), shapes, head_budget_mb=1)
    distiller = Distiller(student, built)
    shard(distiller, student.blocks, here, compute_dtype=dtype)
    for each in members:
        shard(each, each.blocks, here)
    local_teachers = [LocalTeacher(each, tokenizer=tiny_tokenizer()) for each in members]
    if num_teachers == 1:
        return distiller, local_teachers[0]
    return distiller, Ensemble(local_teachers, [1.0] * num_teachers)


def figures(
    here,
    folder,
    *,
    dtype=None,
    checkpointing="none",
    reduce="auto",
    passes=1,
    rows=ROWS,
    length=LENGTH,
    num_teachers=1,
):
    """What a step of a rank takes."""
    distiller, local = sharded_pair(here, folder, dtype, num_teachers)
    config = RunConfig(
        teacher={"type": "online"},
        student={"type": "pretrained"},
        data=DataConfig(path="none", sequence_length=length),
        optim=OptimConfig(learning_rate=0.001, steps=3),
        memory=MemoryConfig(activation_checkpointing=checkpointing, reduce_gradients=reduce),
        output=Path("none"),
    )
    return dry_run(distiller, local, config, here, micro_batch=rows, passes=passes)


def as_a_rank(here, folder):
    for name, (size, setting) in CASES.items():
        if size == here.size:
            step = figures(here, folder, **setting)
            if here.is_main:
                (folder / f"real {name}").write_text(json.dumps(asdict(step)))


def alone_on_a_mesh(folder):
    with world(torch.device("cpu"), "always") as here:
        as_a_rank(here, folder)


def simulated(folder):
    for name, (size, setting) in CASES.items():
        with simulated_world(size, device="cpu") as here:
            step = figures(here, folder, **setting)
        (folder / f"simulated {name}").write_text(json.dumps(asdict(step)))


def simulated_more(folder):
    with simulated_world(4, device="cpu", replicate=2) as here:
        for reduce in REDUCE:
            step = figures(here, folder, passes=3, reduce=reduce)
            (folder / f"simulated copies {reduce}").write_text(json.dumps(asdict(step)))
    # Nothing of a third micro-batch is extrapolated.
    sys.modules[dry_run.__module__].REPEATED = 3
    with simulated_world(2, device="cpu") as here:
        step = figures(here, folder, **CASES["three micro-batches"][1])
    (folder / "all of three").write_text(json.dumps(asdict(step)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("footprints")
    for name, layers, width in (("student", STUDENT_LAYERS, 32), ("teacher", TEACHER_LAYERS, 48)):
        save_student(tiny_llama(layers, width, VOCABULARY), tiny_tokenizer(), folder / name)
    on_ranks(2, as_a_rank, folder)
    assert live(alone_on_a_mesh, folder) == 0
    assert live(simulated, folder) == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_simulated_step_is_a_real_one(folder, name):
    real, mine = (
        json.loads((folder / f"{kind} {name}").read_text()) for kind in ("real", "simulated")
    )
    assert mine == real
    assert mine["memory_bytes"]["activations"] > 0
    assert mine["flops"] > 0


def test_gloo_s_copy_of_what_it_reduces_counts(folder):
    """At the peak there are a head's gradients in bfloat16, and gloo's copy in float32."""
    step = json.loads((folder / "simulated reduced at the peak").read_text())
    head, norm = VOCABULARY * 32, 32
    copy = 4 * (head + norm)
    assert step["memory_bytes"]["gradients, not yet reduced"] == copy + 2 * head


def as_a_rank_of_copies(here, folder, reduce):
    step = figures(here, folder, passes=3, reduce=reduce)
    if here.is_main:
        (folder / f"real copies {reduce}").write_text(json.dumps(asdict(step)))


@pytest.fixture(scope="module")
def more(folder):
    assert live(simulated_more, folder) == 0
    return folder


@pytest.mark.long
@pytest.mark.parametrize("reduce", REDUCE)
def test_a_simulated_step_of_copies_is_a_real_one(more, reduce):
    folder = more
    on_ranks(4, as_a_rank_of_copies, folder, reduce, replicate=2)
    real, mine = (
        json.loads((folder / f"{kind} copies {reduce}").read_text())
        for kind in ("real", "simulated")
    )
    assert mine == real


@pytest.mark.parametrize("reduce", REDUCE)
def test_copies_add_one_sum_of_shards_a_step(more, reduce):
    mine = json.loads((more / f"simulated copies {reduce}").read_text())
    sums = [
        (each["ranks"], each["stride"], each["count"], each["whole_bytes"])
        for each in mine["collectives"]
        if each["kind"] == "all-reduce"
    ]
    student = bytes_of(tiny_llama(STUDENT_LAYERS, 32, VOCABULARY))
    assert sums[0] == (2, 2, 2 + STUDENT_LAYERS, student / 2)
    assert sums[1][:2] == (4, 1), "scored tokens, losses"
    counts = {(each["kind"], each["ranks"]): each["count"] for each in mine["collectives"]}
    passes = 1 if reduce == "step" else 3
    assert counts["reduce-scatter", 2] == passes * (2 + STUDENT_LAYERS)


def bytes_of(model):
    return sum(p.nbytes for p in model.parameters())


def test_the_plan_of_three_micro_batches_follows_from_two(more):
    files = (more / f"{name}" for name in ("simulated three micro-batches", "all of three"))
    short, whole = (json.loads(file.read_text()) for file in files)
    short["memory_bytes"]["activations"] += 3 * 8  # a micro-batch's losses, in float64
    assert short == whole


@pytest.mark.parametrize(("name", "reductions"), [("three micro-batches", 1), ("each reduced", 3)])
def test_a_rank_of_two_holds_half_and_gathers_each_unit_as_planned(folder, name, reductions):
    step = json.loads((folder / f"simulated {name}").read_text())
    student = tiny_llama(STUDENT_LAYERS, 32, VOCABULARY)
    teacher = tiny_llama(TEACHER_LAYERS, 48, VOCABULARY)
    held = step["memory_bytes"]
    rotary = 2 * 4  # two buffers of float32, for half of a head's channels
    assert held["student weights"] == bytes_of(student) / 2 + rotary * 4
    if reductions == 1:
        assert held["gradients, not yet reduced"] == bytes_of(student)
        assert "gradients" not in held
    else:
        assert held["gradients"] == bytes_of(student) / 2
    counters = 4 * len(list(student.parameters()))
    assert held["optimizer state"] == bytes_of(student) + counters
    assert held["teacher weights"] == bytes_of(teacher) / 4 + rotary * 6  # bfloat16
    counts = {each["kind"]: each["count"] for each in step["collectives"]}
    # Roots, embeddings, blocks; a block of the student once more for its backward pass.
    gathers = (2 + 2 * STUDENT_LAYERS) + (2 + TEACHER_LAYERS)
    assert counts == {
        "all-gather": 3 * gathers,
        "reduce-scatter": reductions * (2 + STUDENT_LAYERS),
        "all-reduce": 2,  # scored tokens; losses and the gradient's norm
    }
    for model, name, size in ((student, "student", 2), (teacher, "teacher", 2)):
        head = size * VOCABULARY * model.width
        assert head < held[f"{name} weights, gathered"] < 1.5 * head, "no embedding beside it"
    sizes = {each["kind"]: each["whole_bytes"] for each in step["collectives"]}
    assert sizes["reduce-scatter"] == reductions * bytes_of(student)
    root = bytes_of(student) - sum(p.nbytes for p in student.blocks.parameters())
    gathered = 2 * bytes_of(student) - root + bytes_of(teacher)
    assert sizes["all-gather"] == 3 * gathered / 2


def test_a_peak_between_operations_is_looked_at():
    """FSDP2 gives memory to gathered weights by resizing storages, which is no operation."""
    footprint, seen = Footprint([]), []
    with footprint:
        storage = torch.empty(1000).untyped_storage()
        storage.resize_(0)
        footprint.reset(0.0, lambda: seen.append([size for _, size, _ in footprint.storages()]))
        storage.resize_(4000)
        small = torch.empty(10)
        storage.resize_(0)
        torch.empty(100)
    assert footprint.peak_bytes == 4040
    assert seen == [[4000], [4000, small.nbytes]]


def released(here):
    distiller, teacher = toy_pair()
    shard(distiller, distiller.student.blocks, here)
    teacher.shard(here)
    models = {"student": distiller, "teacher": teacher.model}
    optimizers = [torch.optim.SGD(distiller.parameters(), lr=0.01)]
    footprint = Footprint(models.values())
    batches = [ToyBatches().batch([0]), ToyBatches().batch([1])]

    def gathered():
        purposes = by_purpose(footprint, models, optimizers, vocabulary=37)
        return sum(size for name, size in purposes.items() if "gathered" in name)

    with footprint:
        teacher.signal(batches[0])
        assert gathered() > 0, "the head, for the loss"
        for _ in range(2):
            train_step(distiller, teacher, optimizers, batches, here)
            assert gathered() == 0


def test_no_weight_stays_gathered_after_a_step():
    on_ranks(2, released)


def measured_between_steps():
    with world(torch.device("cpu"), "always") as here:
        teacher, batch = toy_pair()[1], random_batch(vocabulary=37)
        teacher.shard(here)
        measuring = for_measuring(teacher, here)
        logits = []
        for _ in range(2):
            distribution = measuring.signal(batch).distribution
            logits.append(distribution.head(distribution.hidden))
            teacher.release()
        assert torch.equal(*logits)


def test_a_cached_signal_has_its_head_after_a_step_has_released_it():
    assert live(measured_between_steps) == 0
