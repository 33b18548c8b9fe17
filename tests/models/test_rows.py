"""A model with fewer tokens says of them what it said before, bit for bit, in every family."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from limbeck.errors import ConfigError
from limbeck.prune import named_ids, prove_same_logits, with_tokens
from limbeck.prune.rows import cut_rows
from tests.models.tiny import FAMILIES, VOCABULARY, tiny_llama, tiny_model

KEPT = tuple(sorted(torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[:61]))
KEPT = tuple(int(i) for i in KEPT)
CHOSEN = torch.tensor(KEPT)
IDS = torch.randint(len(KEPT), (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (False, True)], ids=str)
def model(request):
    family, tied = request.param
    return tiny_model(family, tie_word_embeddings=tied)


def test_logits_of_kept_tokens_are_the_whole_models_bit_for_bit(model):
    trimmed = with_tokens(model, KEPT)
    assert trimmed.config.vocab_size == trimmed.vocabulary_rows == len(KEPT)
    assert trimmed.vocabulary_size == len(KEPT)
    with torch.no_grad():
        wanted = model.hf_model(CHOSEN[IDS]).logits[..., CHOSEN]
        assert torch.equal(trimmed.hf_model(IDS).logits, wanted)
    prove_same_logits(model, trimmed, KEPT, IDS)


def test_a_saved_pruned_model_is_ordinary_and_keeps_its_tied_head(model, tmp_path):
    trimmed = with_tokens(model, KEPT)
    trimmed.hf_model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, trimmed.hf_model(IDS).logits)
    same = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert same == (
        model.hf_model.get_input_embeddings().weight
        is model.hf_model.get_output_embeddings().weight
    )
    fewer = VOCABULARY - len(KEPT)
    biases = fewer if model.hf_model.get_output_embeddings().bias is not None else 0
    tables = 1 if same else 2
    saved = model.num_parameters - plain.num_parameters()
    assert saved == fewer * model.width * tables + biases


def test_the_pruned_distribution_is_the_original_renormalised():
    whole = tiny_llama(2, 32)
    trimmed = with_tokens(whole, KEPT)
    with torch.no_grad():
        p = torch.softmax(whole.logits(CHOSEN[IDS]).double(), -1)[..., CHOSEN]
        q = torch.softmax(trimmed.logits(IDS).double(), -1)
    torch.testing.assert_close(q, p / p.sum(-1, keepdim=True))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_kept_logits_are_the_whole_models(tied):
    whole = tiny_llama(2, 32, tied=tied)
    trimmed = with_tokens(whole, KEPT)
    whole.hf_model(CHOSEN[IDS]).logits[..., CHOSEN].square().mean().backward()
    trimmed.hf_model(IDS).logits.square().mean().backward()
    old = dict(whole.hf_model.named_parameters())
    for name, parameter in trimmed.hf_model.named_parameters():
        gradient = old[name].grad
        if gradient.shape != parameter.shape:
            gone = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, CHOSEN, False)
            assert not gradient[gone].any()
            gradient = gradient[CHOSEN]
        torch.testing.assert_close(parameter.grad, gradient)


def test_keeping_every_token_gives_the_model_itself(model):
    same = with_tokens(model, tuple(range(VOCABULARY)))
    old = model.hf_model.state_dict()
    assert all(torch.equal(t, old[name]) for name, t in same.hf_model.state_dict().items())
    next(same.hf_model.parameters()).data.add_(1)
    assert not torch.equal(next(same.hf_model.parameters()), next(model.hf_model.parameters()))


def test_padded_rows_go_with_the_tokens():
    model = tiny_llama(1, 32, vocabulary=128)
    model.vocabulary_size = 90
    assert with_tokens(model, KEPT[:40]).vocabulary_rows == 40


def test_ids_in_both_configurations_are_the_new_ones():
    model = tiny_model("llama", bos_token_id=KEPT[3], eos_token_id=[KEPT[5], KEPT[7]])
    gone = next(i for i in range(VOCABULARY) if i not in KEPT)
    model.hf_model.config.pad_token_id = -1
    model.hf_model.generation_config = GenerationConfig(
        bos_token_id=KEPT[3],
        eos_token_id=[KEPT[5], gone],
        pad_token_id=KEPT[9],
        suppress_tokens=[gone, KEPT[11]],
        begin_suppress_tokens=[gone],
        bad_words_ids=[[KEPT[1], gone], [KEPT[1], KEPT[2]]],
        temperature=0.3,
        do_sample=True,
    )
    assert named_ids(model) == {-1, gone, *(KEPT[i] for i in (3, 5, 7, 9))}
    trimmed = with_tokens(model, KEPT)
    config, settings = trimmed.config, trimmed.hf_model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, [5, 7], None)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (3, [5], 9)
    assert settings.suppress_tokens == [11]
    assert settings.begin_suppress_tokens is None
    assert settings.bad_words_ids == [[1, 2]]
    assert settings.temperature == 0.3
    assert trimmed.end_ids == {5}
    assert model.config.bos_token_id == KEPT[3], "the whole one is not changed"


def test_generation_settings_with_token_ids_are_refused():
    model = tiny_llama(1, 32)
    model.hf_model.generation_config = GenerationConfig(sequence_bias=[[[3], 1.0]])
    with pytest.raises(ConfigError, match=r"must not force tokens.*llama.*sequence_bias\. Remov"):
        with_tokens(model, KEPT)


def test_a_weight_that_depends_on_the_vocabulary_in_another_way_is_refused():
    model = tiny_llama(1, 32)
    shapes = {name: tensor.shape for name, tensor in model.hf_model.state_dict().items()}
    shapes["model.norm.weight"] = torch.Size([31])
    with pytest.raises(ConfigError, match=r"model\.norm\.weight .*is \(32,\).*would be \(31,\)"):
        dict(cut_rows(model, KEPT, shapes))


def test_a_model_with_other_logits_for_kept_tokens_is_refused():
    model = tiny_llama(1, 32)
    with pytest.raises(ConfigError, match=r"those of this llama model differ by up to .* prune"):
        prove_same_logits(model, with_tokens(model, KEPT), KEPT[1:] + KEPT[:1], IDS)
