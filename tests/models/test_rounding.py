"""Students that compute with rounded weights: the formats, the gradients, and what is saved."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from limbeck.config.trainable import LowRankConfig, TrainableConfig, trainable_problems
from limbeck.errors import ConfigError
from limbeck.models import plain_weights, save_student
from limbeck.models.freezing import make_trainable, trained_facts
from limbeck.models.rounding import FORMATS, RoundedLinear, rounded
from tests.models.tiny import tiny_model, tiny_tokenizer

KINDS = {"q4_0": Kind.Q4_0, "q8_0": Kind.Q8_0}
IDS = torch.arange(24).view(2, 12)


def awkward_weight():
    """Blocks of normal numbers, of zeros, of one number, of large and of tiny ones."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    weight[0, :32], weight[1, 32:64], weight[2] = 0.0, 0.25, weight[2] * 1e4
    weight[3], weight[4, 5] = weight[3] * 1e-6, 100.0
    return weight


def rounding_model(to="q4_0", family="llama"):
    model = tiny_model(family, tie_word_embeddings=True)
    make_trainable(model, TrainableConfig(quantize=to), 0)
    return model


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_format_is_ggufs_own_bit_for_bit(to):
    weight = awkward_weight()
    stored = gguf.quants.quantize(weight.numpy(), KINDS[to])
    expected = gguf.quants.dequantize(stored, KINDS[to])
    np.testing.assert_array_equal(rounded(weight, to).numpy(), expected)


@pytest.mark.parametrize("to", list(FORMATS))
def test_a_rounded_weight_is_rounded_to_itself(to):
    once = rounded(awkward_weight(), to)
    assert torch.equal(rounded(once, to), once)


def test_the_gradient_is_that_of_a_plain_layer_with_the_rounded_weight():
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(64, 8), torch.randn(5, 64)
    own = RoundedLinear(layer, "q4_0")
    plain = torch.nn.Linear(64, 8)
    with torch.no_grad():
        plain.weight.copy_(rounded(layer.weight, "q4_0"))
        plain.bias.copy_(layer.bias)
    own(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.equal(own.weight.grad, plain.weight.grad)
    assert torch.equal(own.bias.grad, plain.bias.grad)


def test_names_of_weights_do_not_change_and_all_are_trained():
    plain, model = tiny_model("llama", tie_word_embeddings=True), rounding_model()
    assert set(model.state_dict()) == set(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert trained_facts(model, TrainableConfig(quantize="q4_0"))["quantize"] == "q4_0"


def test_the_saved_student_computes_what_the_trained_one_computed(tmp_path):
    model = rounding_model()
    save_student(model, tiny_tokenizer(), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        found = saved(IDS).logits[..., : model.vocabulary_size]
        torch.testing.assert_close(found, model.logits(IDS))
        assert not torch.allclose(found, tiny_model("llama", tie_word_embeddings=True).logits(IDS))
    weights = plain_weights(model)
    name = f"{model.blocks_name}.0.mlp.down_proj.weight"
    assert torch.equal(weights[name], saved.get_parameter(name))


def test_layers_that_cannot_be_rounded_are_refused():
    with pytest.raises(ConfigError, match="no linear layers that can be rounded"):
        rounding_model(family="gpt2")
    narrow = tiny_model("llama", tie_word_embeddings=True)
    narrow.blocks[0].mlp.down_proj = torch.nn.Linear(40, 8)
    with pytest.raises(ConfigError, match=r"divisible by 32.*0\.mlp\.down_proj have 40"):
        make_trainable(narrow, TrainableConfig(quantize="q8_0"), 0)


def test_rounding_and_adapters_together_are_refused():
    config = TrainableConfig(quantize="q4_0", lora=LowRankConfig())
    (problem,) = trainable_problems(config)
    assert problem.at == "trainable.quantize"
