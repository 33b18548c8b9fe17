import pytest

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import save_student, tensors_hash
from limbeck.students import Origin, initialisers
from tests.models.tiny import tiny_llama, tiny_tokenizer
from tests.train.toy import ALONE


def test_student_is_the_saved_model_with_its_own_tokenizer(tmp_path):
    model = tiny_llama(2, 32)
    save_student(model, tiny_tokenizer(70), tmp_path)
    origin = Origin(tiny_llama(5, 32, seed=1), tiny_tokenizer(90), ALONE)
    student = initialisers.bind({"type": "pretrained", "path": str(tmp_path)}, "student")(origin)
    assert tensors_hash(student.model) == tensors_hash(model)
    assert len(student.tokenizer) == 70
    assert student.layer_map == LayerMap(((0, 0), (1, 4)))
    assert student.facts["origin"] == "pretrained"
    assert student.facts["name"] == str(tmp_path)


def test_every_initialiser_explains_itself():
    assert initialisers.names() == ["copy", "depth", "pretrained", "random", "shared", "width"]
    assert all(initialisers.describe(name) for name in initialisers.names())


def test_missing_model_is_refused(tmp_path):
    origin = Origin(None, tiny_tokenizer(), ALONE)
    make = initialisers.bind({"type": "pretrained", "path": str(tmp_path / "no")}, "student")
    with pytest.raises(ConfigError, match="no such folder"):
        make(origin)
