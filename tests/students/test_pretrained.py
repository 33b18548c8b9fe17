import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import save_student
from limbeck.students import Origin, initialisers
from tests.models.tiny import tensors_hash, tiny_llama, tiny_tokenizer
from tests.tokenizers.small import BEGIN, CHATML, small
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
    assert all(initialisers.explain(name).summary for name in initialisers.names())


def test_missing_model_is_refused(tmp_path):
    origin = Origin(None, tiny_tokenizer(), ALONE)
    make = initialisers.bind({"type": "pretrained", "path": str(tmp_path / "no")}, "student")
    with pytest.raises(ConfigError, match="no such folder"):
        make(origin)


def test_a_base_model_takes_over_every_end_token_of_its_teacher(tmp_path):
    base, chat = small(end=BEGIN), small(template=CHATML)
    save_student(tiny_llama(2, 32, vocabulary=len(chat)), base, tmp_path)
    teacher = tiny_llama(2, 32, vocabulary=len(chat))
    teacher.hf_model.generation_config.eos_token_id = [chat.eos_token_id, base.eos_token_id]
    spec = {"type": "pretrained", "path": str(tmp_path), "tokenizer": "teacher"}
    student = initialisers.bind(spec, "student")(Origin(teacher, chat, ALONE))
    assert student.model.end_ids == teacher.end_ids
    assert len(student.model.end_ids) == 2


def test_a_base_model_takes_over_its_teachers_template_and_end_token(tmp_path):
    base, chat = small(end=BEGIN), small(template=CHATML)
    assert base.eos_token_id != chat.eos_token_id
    save_student(tiny_llama(2, 32, vocabulary=len(chat)), base, tmp_path / "base")
    origin = Origin(tiny_llama(2, 32, vocabulary=len(chat)), chat, ALONE)
    spec = {"type": "pretrained", "path": str(tmp_path / "base"), "tokenizer": "teacher"}
    student = initialisers.bind(spec, "student")(origin)
    assert student.tokenizer is chat
    save_student(student.model, student.tokenizer, tmp_path / "student")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert saved.config.eos_token_id == chat.eos_token_id
    assert saved.generation_config.eos_token_id == chat.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template == CHATML


def test_other_ids_are_refused_with_the_teachers_tokenizer_too(tmp_path):
    save_student(tiny_llama(2, 32), tiny_tokenizer(70), tmp_path)
    origin = Origin(tiny_llama(2, 32), small(), ALONE)
    spec = {"type": "pretrained", "path": str(tmp_path), "tokenizer": "teacher"}
    with pytest.raises(ConfigError, match="Every token id must mean the same"):
        initialisers.bind(spec, "student")(origin)
