"""Adapters and frozen parts on two FSDP2 ranks: the steps and the student of one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from limbeck.config import OptimConfig
from limbeck.config.trainable import LowRankConfig, TrainableConfig
from limbeck.distributed import full_weights, latest, load_checkpoint, shard
from limbeck.models import make_trainable, save_student
from limbeck.train import make_optimizers, train_step
from tests.distributed.processes import on_ranks
from tests.distributed.saved_checkpoint import save_checkpoint
from tests.models.tiny import tiny_tokenizer
from tests.train.toy import ALONE, ToyBatches, toy_pair

pytestmark = pytest.mark.slow
STEPS = [([[0], []], [[1, 2], [3]]), ([[4, 5], [6]], [[7], []])]
LORA = {"lora": LowRankConfig(rank=2, dora=True, targets=("q_proj", "down_proj", "lm_head"))}
FROZEN = {"freeze": ("embeddings", "layers.0")}


def run(world, trainable, micro_batches_of, folder):
    distiller, teacher = toy_pair()
    make_trainable(distiller.student, TrainableConfig(**trainable), 0)
    shard(distiller, distiller.student.blocks, world)
    shard(teacher.model, teacher.model.blocks, world)
    optim = OptimConfig(type="sgd", learning_rate=0.1, steps=2)
    optimizers = make_optimizers(distiller, optim, 0.1, world.device)
    losses = []
    for step in STEPS:
        batches = [ToyBatches().batch(rows) for rows in micro_batches_of(step)]
        losses.append(train_step(distiller, teacher, optimizers, batches, world).loss)
        save_checkpoint(folder, len(losses), distiller, optimizers, {}, world)
    before = full_weights(distiller, world)
    with torch.no_grad():
        for parameter in distiller.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_checkpoint(latest(folder, world), distiller, optimizers, world)
    after = full_weights(distiller, world)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = full_weights(distiller.student.hf_model, world)
    if world.is_main:
        save_student(distiller.student, tiny_tokenizer(37), folder / "student", weights=weights)
        (folder / "losses.json").write_text(json.dumps(losses))


def as_a_rank(world, trainable, folder):
    run(world, trainable, lambda step: step[world.rank], folder)


def everything_at_once(step):
    return [[row for rank in step for part in rank for row in part]]


@pytest.mark.parametrize("trainable", [LORA, FROZEN], ids=["adapters", "frozen parts"])
def test_two_ranks_train_save_and_export_what_one_process_does(trainable, tmp_path):
    on_ranks(2, as_a_rank, trainable, tmp_path / "ranks")
    run(ALONE, trainable, everything_at_once, tmp_path / "alone")
    losses = [json.loads((tmp_path / n / "losses.json").read_text()) for n in ("ranks", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    students = [
        load_file(tmp_path / n / "student" / "model.safetensors") for n in ("ranks", "alone")
    ]
    assert students[0].keys() == students[1].keys()
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name])
