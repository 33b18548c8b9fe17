"""Every family that limbeck prunes computes in llama.cpp what it computes here."""

import pytest
import torch

from limbeck.config.trainable import LowRankConfig
from limbeck.errors import ConfigError
from limbeck.export.families import FAMILIES, family_of
from limbeck.models.lora import add_adapters
from limbeck.prune import layouts
from tests.export.tiny_students import made, parity_of

LAYERS = {"gemma3_text": 6, "smollm3": 4, "cohere2": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def test_every_family_that_is_pruned_can_be_exported():
    assert sorted(FAMILIES) == sorted(layouts.FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_familys_logits_agree(family, tmp_path):
    student = made(family, layers=LAYERS.get(family, 2))
    parity = parity_of(student, tmp_path, quantize="f16")
    assert parity.passed, parity
    assert parity.mean_kl < 1e-4
    assert parity.long_window == (4 if family == "mistral" else 64)


@pytest.mark.parametrize(
    "more",
    [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LINEAR},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_key_value_heads": 4},
    ],
    ids=["llama3", "linear", "tied", "bias", "as many kv heads"],
)
def test_a_llamas_settings_are_in_the_file(more, tmp_path):
    parity = parity_of(made("llama", **more), tmp_path, quantize="f32")
    assert parity.passed, parity


def test_adapters_are_merged(tmp_path):
    student = made()
    add_adapters(student.model, LowRankConfig(rank=4), seed=0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    assert parity_of(student, tmp_path, quantize="f32").passed


def test_layers_in_whole_periods_can_be_removed(tmp_path):
    assert parity_of(made("gemma2", layers=4), tmp_path, quantize="f16").passed


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer 0 of a gemma2.*period of 2"),
        ("smollm3", {"layers": 4, "no_rope_layers": [1, 1, 0, 1]}, "layer 2 of a smollm3.*rotary"),
        ("gemma2", {"query_pre_attn_scalar": 16}, r"head_dim \(8\), and this student has 16"),
        ("llama", {"hidden_act": "relu"}, "activation silu, and this student has relu"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm = False, and this student has True"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, more, message):
    with pytest.raises(ConfigError, match=message):
        family_of(made(family, **more).model)


def test_an_unknown_rope_scaling_is_refused(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(ConfigError, match=r"default, linear and llama3.*has yarn"):
        parity_of(made(rope_parameters=yarn), tmp_path)


def test_an_unknown_family_is_refused():
    student = made()
    student.model.config.model_type = "alpaca"
    with pytest.raises(ConfigError, match=r"family whose layout is known .*got alpaca"):
        family_of(student.model)
