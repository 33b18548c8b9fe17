import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.distributed import gathered, shard, world
from limbeck.errors import ConfigError, DataError
from limbeck.losses import Multiplied
from limbeck.models import (
    CausalLM,
    head_error,
    neighbours_seen,
    prove_documents_apart,
    prove_head,
)
from limbeck.models.build import from_config
from limbeck.models.prove import HEAD_TOLERANCE, TOLERANCE
from tests.models.tiny import FAMILIES, tiny_config, tiny_llama, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_both_proofs(family, dtype):
    model = tiny_model(family).to(dtype)
    prove_head(model)
    prove_documents_apart(model)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_models_pass(tied):
    model = tiny_llama(2, 32, tied=tied)
    model.vocabulary_size = 90
    prove_head(model)
    prove_documents_apart(model)


@pytest.mark.parametrize("tied", [False, True])
def test_the_bounds_are_of_the_format_a_sharded_model_computes_in(tied):
    """Its embedding stays a float32 shard unless it is tied to the head."""
    model, tokens = tiny_llama(2, 32, tied=tied), torch.arange(12)
    with world(torch.device("cpu"), "always") as here:
        shard(model, model.blocks, here, compute_dtype=torch.bfloat16)
        with gathered(model):
            _, head_bound = head_error(model, tokens[None])
            _, bound, _ = neighbours_seen(model, tokens.split(4))
            prove_head(model)
            prove_documents_apart(model)
    assert head_bound == HEAD_TOLERANCE[torch.bfloat16]
    assert bound == TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_head_is_refused_with_the_family_and_the_difference(family):
    model = tiny_model(family)
    model._transform = Multiplied(1.01)
    with pytest.raises(ConfigError, match=rf"head of a {family} model.*differ by up to [0-9.]+"):
        prove_head(model)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite", "cohere"])
def test_family_missing_from_the_table_would_be_found(family):
    model = tiny_model(family)
    model._transform = tiny_llama(1, 32)._transform
    with pytest.raises(ConfigError, match="limbeck does not know what this family does"):
        prove_head(model)


def test_head_that_gives_no_numbers_is_refused():
    model = tiny_llama(1, 32)
    with torch.no_grad():
        model.hf_model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"lm_head.weight of this \w+ model holds"):
        prove_head(model)


def test_recurrent_model_is_refused_because_its_documents_mix():
    config = tiny_config("lfm2", layer_types=["conv", "full_attention"], norm_eps=1e-5)
    model = CausalLM(from_config(config, torch.float32))
    prove_head(model)
    with pytest.raises(
        ConfigError, match="must not see each other, but in this lfm2 model they do"
    ):
        prove_documents_apart(model)


def test_model_without_position_ids_is_refused():
    config = AutoConfig.for_model("bloom", vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ConfigError, match="bloom models take only input_ids"):
        prove_documents_apart(CausalLM(hf_model))


def test_proofs_leave_training_mode_as_it_was():
    model = tiny_model("gpt2").train()
    prove_head(model)
    prove_documents_apart(model)
    assert model.training
