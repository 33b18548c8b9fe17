import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.losses import SignalNeeds
from limbeck.losses.distributions import LazyLogits
from limbeck.models import save_student
from limbeck.teachers import TeacherRequest, teachers
from limbeck.teachers.local import LocalTeacher
from tests.models.tiny import random_batch, tiny_llama, tiny_model, tiny_tokenizer
from tests.train.toy import ALONE


def test_signal_is_the_models_distribution_at_the_scored_positions():
    model, batch = tiny_model("gemma2"), random_batch()
    distribution = LocalTeacher(model).signal(batch).distribution
    assert isinstance(distribution, LazyLogits)
    logits = model.hf_model(batch.input_ids).logits[batch.scored]
    torch.testing.assert_close(distribution.head(distribution.hidden), logits.detach())


def test_signal_holds_what_was_asked_for_and_no_more():
    teacher, batch = LocalTeacher(tiny_llama(3, 32)), random_batch()
    teacher.require(TeacherRequest(needs=SignalNeeds(layers=frozenset({0, 2}))))
    signal = teacher.signal(batch)
    assert signal.distribution is None
    assert list(signal.layer_hidden) == [0, 2]
    teacher.require(TeacherRequest(needs=SignalNeeds()))
    assert teacher.signal(batch).layer_hidden == {}


def test_teacher_is_frozen_and_has_no_graph():
    model = tiny_model("gpt2").train()
    teacher, batch = LocalTeacher(model), random_batch()
    first, second = teacher.signal(batch).distribution, teacher.signal(batch).distribution
    assert not first.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(first.hidden, second.hidden), "dropout must be off"


def test_layer_the_teacher_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"layers 0 to 1.*reads layers \[5\]"):
        LocalTeacher(tiny_llama(2, 32), SignalNeeds(layers=frozenset({1, 5})))


def test_padded_rows_are_no_part_of_the_signal():
    model = tiny_llama(2, 32)
    model.vocabulary_size = 90
    distribution = LocalTeacher(model).signal(random_batch(vocabulary=90)).distribution
    assert distribution.head(distribution.hidden).shape[-1] == 90


def test_online_teacher_is_made_from_a_recipe(tmp_path):
    model = tiny_llama(2, 32)
    save_student(model, tiny_tokenizer(), tmp_path / "teacher")
    make = teachers.bind({"type": "online", "path": str(tmp_path / "teacher")}, "teacher")
    teacher = make(ALONE)
    assert teacher.info.name == str(tmp_path / "teacher")
    assert teacher.info.dtype == "float32"
    expected = LocalTeacher(model).signal(random_batch()).distribution.hidden
    assert torch.equal(teacher.signal(random_batch()).distribution.hidden, expected)


def test_recipe_of_a_teacher_is_checked():
    problems = teachers.problems({"type": "online", "pth": "x"}, "teacher")
    assert [p.at for p in problems] == ["teacher.pth", "teacher.path"]
