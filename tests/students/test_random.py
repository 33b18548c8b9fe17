import json

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.models import save_student
from limbeck.prune import Shape, resized_config
from limbeck.students import Origin, initialisers
from tests.models.tiny import (
    FAMILIES,
    tensors_hash,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)
from tests.train.toy import ALONE

CPU = torch.device("cpu")


def make(teacher, seed=0, **options):
    spec = {"type": "random", **options}
    return initialisers.bind(spec, "student")(Origin(teacher, tiny_tokenizer(), ALONE, seed=seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_student_is_of_the_teachers_kind_and_of_the_size_asked_for(family):
    student = make(tiny_model(family, layers=4), layers=2, width=16, heads=2).model
    assert student.family == family
    assert (student.num_layers, student.width, student.vocabulary_rows) == (2, 16, 128)
    assert student.config.num_attention_heads == 2
    assert student.vocabulary_size == 90


def test_weights_depend_on_the_seed_only():
    teacher, options = tiny_llama(3, 32), {"layers": 1, "width": 16}
    first = make(teacher, **options)
    torch.manual_seed(99)
    assert tensors_hash(make(teacher, **options).model) == tensors_hash(first.model)
    assert tensors_hash(make(teacher, seed=1, **options).model) != tensors_hash(first.model)
    assert first.facts["origin"] == "random"


def test_layer_map_is_uniform_and_empty_for_a_deeper_student():
    teacher = tiny_llama(3, 32)
    assert make(teacher, layers=2, width=16).layer_map == LayerMap(((0, 0), (1, 2)))
    assert make(teacher, layers=4, width=16).layer_map == LayerMap(())


def test_unset_sizes_follow_from_the_teacher():
    config = resized_config(tiny_config("llama"), Shape(layers=1, width=16), 64)
    assert config.num_attention_heads == 2, "heads keep their size, 8"
    assert config.num_key_value_heads == 1
    assert config.intermediate_size == 32
    assert config.max_position_embeddings == 64
    config = resized_config(tiny_config("qwen3", head_dim=16), Shape(layers=1, width=64), 64)
    assert (config.num_attention_heads, config.head_dim) == (4, 16)


def test_size_may_come_from_a_configuration(tmp_path):
    pattern = tiny_config("qwen3", layers=3, vocabulary=500)
    pattern.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        student = make(None, config=str(path))
        assert student.model.family == "qwen3"
        assert (student.model.num_layers, student.model.vocabulary_rows) == (3, 128)
        assert student.model.end_ids == {2}
        assert student.layer_map == LayerMap(())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "needs layers and width"),
        ({"layers": 2, "width": 30, "heads": 4}, "width 30 and heads 4"),
        (
            {"layers": 2, "width": 32, "heads": 4, "kv_heads": 3},
            "multiple of kv_heads, got 4 and 3",
        ),
        ({"layers": 2, "config": "x.json"}, "from options, got both"),
        ({"config": "/nowhere/config.json"}, "must be a model's config.json"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(tiny_llama(2, 32), **options)


def test_family_without_grouped_heads_takes_none():
    with pytest.raises(ConfigError, match="gpt2 models have as many kv_heads as heads"):
        make(tiny_model("gpt2"), layers=1, width=32, heads=4, kv_heads=2)


def test_recorded_teacher_needs_a_configuration():
    with pytest.raises(ConfigError, match=r"Set student\.config to"):
        make(None, layers=1, width=16)


def test_saved_random_student_says_its_true_shape(tmp_path):
    student = make(tiny_model("gemma2", layers=4), layers=3, width=16, heads=2)
    save_student(student.model, student.tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 3
    assert (config["hidden_size"], config["vocab_size"], config["dtype"]) == (16, 128, "float32")
