"""Teacher and student in one copy of the weights."""

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.config.trainable import LowRankConfig, TrainableConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller, make_trainable, shared_model
from limbeck.teachers.local import LocalTeacher
from limbeck.train import train_step
from tests.models.tiny import random_batch, tiny_model
from tests.train.toy import ALONE

LORA = TrainableConfig(lora=LowRankConfig(rank=4, alpha=16.0, dropout=0.1))


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_there_is_one_copy_of_the_weights(family, tied):
    teacher = LocalTeacher(tiny_model(family, tie_word_embeddings=tied))
    student = shared_model(teacher.model)
    assert storages(student) == storages(teacher.model)
    make_trainable(student, LORA, 0)
    student.to("cpu")
    both = storages(student) | storages(teacher.model)
    adapters = sum(4 * p.numel() for p in student.parameters() if p.requires_grad)
    assert sum(both.values()) == sum(storages(teacher.model).values()) + adapters
    modules = {*student.modules()} & {*teacher.model.modules()}
    assert not modules, "an adapter in a common module would be in both"


def test_the_teachers_outputs_are_bitwise_unchanged_in_every_step():
    alone = LocalTeacher(tiny_model("llama", tie_word_embeddings=False))
    teacher = LocalTeacher(tiny_model("llama", tie_word_embeddings=False))
    student = shared_model(teacher.model)
    make_trainable(student, LORA, 0)
    shapes = PairShapes(2, 2, 32, 32, LayerMap.uniform(2, 2))
    objective = build_objective(ObjectiveConfig(alpha=0.2), shapes, head_budget_mb=1)
    distiller = Distiller(student, objective).train()
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses, batch = [], random_batch()
    probe = random_batch(seed=7)
    for _ in range(6):
        losses.append(train_step(distiller, teacher, [optimizer], [batch], ALONE).loss)
        said, wanted = teacher.signal(probe).distribution, alone.signal(probe).distribution
        assert torch.equal(said.hidden, wanted.hidden)
        assert torch.equal(said.head(said.hidden), wanted.head(wanted.hidden))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        ids = probe.input_ids
        assert not torch.equal(student.logits(ids), teacher.model.logits(ids))
