import dataclasses

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import configuration_utils

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.models import CausalLM, attention, checkpoint_activations
from tests.models.tiny import FAMILIES, VOCABULARY, random_batch, tiny_llama, tiny_model


def packed_batch(first: torch.Tensor, second: torch.Tensor, padding: int = 0) -> Batch:
    """Two documents and padding in one row, every position of the documents scored."""
    ids = torch.cat([first, second, torch.zeros(padding, dtype=torch.long)])[None]
    lengths = [len(first), len(second), padding]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), d) for n, d in zip(lengths, [0, 1, -1], strict=True)])
    return Batch(ids, ids, (documents >= 0)[None], positions, documents[None])


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_states_is_the_logits_of_the_whole_model(family):
    model, batch = tiny_model(family), random_batch()
    with torch.no_grad():
        hidden, _ = model(batch)
        whole = model.hf_model(batch.input_ids).logits
    torch.testing.assert_close(model.head(hidden), whole[batch.scored])
    torch.testing.assert_close(model.logits(batch.input_ids), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_one_row_have_the_logits_they_have_alone(family):
    model = tiny_model(family)
    first, second = torch.randint(VOCABULARY, (7,)), torch.randint(VOCABULARY, (9,))
    with torch.no_grad():
        packed, _ = model(packed_batch(first, second, padding=3))
        alone = [model.decoder(doc[None], use_cache=False)[0][0] for doc in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_are_the_outputs_of_their_blocks(family):
    model, batch = tiny_model(family, layers=3), random_batch()
    with torch.no_grad():
        _, layers = model(batch, [0, 1])
        every = model.hf_model(batch.input_ids, output_hidden_states=True).hidden_states
    assert list(layers) == [0, 1]
    for layer, hidden in layers.items():
        torch.testing.assert_close(hidden, every[layer + 1][batch.scored])


def test_hooks_are_gone_after_the_forward_pass():
    model = tiny_llama(2, 32)
    model(random_batch(), [0, 1])
    with pytest.raises(IndexError):
        model(random_batch(), [0, 7])
    assert not any(block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("tied", [False, True])
def test_values_in_padded_rows_change_nothing(tied):
    model, batch = tiny_llama(2, 32, tied=tied), random_batch(vocabulary=90)
    model.vocabulary_size = 90
    before = model.logits(batch.input_ids), model.generate([1, 2], 8)
    with torch.no_grad():
        model.head.weight._base[90:] = 1e6
    after = model.logits(batch.input_ids), model.generate([1, 2], 8)
    assert before[0].shape[-1] == 90
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    whole = model.hf_model(batch.input_ids).logits
    assert (whole.argmax(-1) >= 90).any(), "the junk would be seen without the cut"


def test_padded_rows_get_no_gradient():
    model, batch = tiny_llama(2, 32), random_batch(vocabulary=90)
    model.vocabulary_size = 90
    hidden, _ = model(batch)
    model.head(hidden).logsumexp(-1).sum().backward()
    gradient = model.hf_model.lm_head.weight.grad
    assert gradient[:90].abs().sum() > 0
    assert gradient[90:].abs().sum() == 0


@pytest.mark.parametrize("size", [0, VOCABULARY + 1])
def test_vocabulary_must_fit_into_the_head(size):
    with pytest.raises(ConfigError, match=f"between 1 and {VOCABULARY} tokens.*got {size}"):
        tiny_llama(1, 32).vocabulary_size = size


def test_head_is_a_view_of_the_models_own_weights():
    model = tiny_llama(1, 32)
    model.vocabulary_size = 64
    assert model.head.weight.data_ptr() == model.hf_model.lm_head.weight.data_ptr()


def test_heads_bias_is_cut_with_its_weight():
    model = tiny_model("phi")
    model.vocabulary_size = 64
    assert model.head.bias.shape == (64,)
    assert model.whole_head.bias.shape == (VOCABULARY,)


def test_tied_parameters_count_once():
    tied, untied = tiny_llama(2, 32, tied=True), tiny_llama(2, 32)
    assert untied.num_parameters - tied.num_parameters == VOCABULARY * 32


def test_shape_is_read_from_the_model():
    model = tiny_model("gpt2", layers=3)
    shape = model.num_layers, model.width, model.vocabulary_rows, model.max_positions, model.family
    assert shape == (3, 32, VOCABULARY, 64, "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_that_of_transformers(family):
    model, prompt = tiny_model(family), [5, 9, 2, 7]
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt])
    expected = model.hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    assert model.generate(prompt, 10) == expected[0, len(prompt) :].tolist()


def test_generation_causes_no_warning_of_transformers(monkeypatch):
    warnings = []
    logger = configuration_utils.logger
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    tiny_model("llama").generate([5, 9], 2)
    assert warnings == []


def test_generation_ends_with_an_end_token_and_with_the_longest_sequence():
    model = tiny_llama(2, 32)
    free = model.generate([1, 2], 1000)
    assert len(free) == 62
    end = free[3]
    model.hf_model.generation_config.eos_token_id = [end]
    assert model.generate([1, 2], 1000) == free[: free.index(end) + 1]
    with pytest.raises(ConfigError, match="at least one token"):
        model.generate([], 3)


def test_generation_leaves_training_mode_as_it_was():
    model = tiny_model("gpt2").train()
    model.generate([1], 2)
    assert model.training
    assert model.blocks[0].training


def gradients(model: CausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    hidden, layers = model(batch, [0, 1])
    loss = model.head(hidden).logsumexp(-1).sum() + sum(h.square().sum() for h in layers.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_kernel_tried_inside_a_checkpointed_block_changes_no_gradient(monkeypatch):
    """It is tried in the block's first pass and not when the block is computed again."""
    tried = []

    def as_a_kernel(*tensors_and_options):
        tried.append(len(tensors_and_options[0]))
        return attention.one_by_one(*tensors_and_options)

    monkeypatch.setitem(attention.VARLEN_DTYPES, "cpu", (torch.float32,))
    monkeypatch.setattr(attention, "varlen", as_a_kernel)
    model, batch = (
        tiny_model("llama", layers=3).train(),
        packed_batch(torch.randint(VOCABULARY, (7,)), torch.randint(VOCABULARY, (9,))),
    )
    found = {}
    for how in ("none", "selective"):
        attention.has_varlen.cache_clear()
        checkpoint_activations(model, how)
        found[how] = gradients(model, batch)
    attention.has_varlen.cache_clear()
    assert tried.count(sum(attention.PROBED)) == 2
    torch.testing.assert_close(found["selective"], found["none"])


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_activation_checkpointing_changes_no_gradient(family, how):
    model, batch = tiny_model(family, layers=3).train(), random_batch()
    plain, calls = gradients(model, batch), []
    checkpoint_activations(model, how)
    inside = next(model.blocks[1].children())
    counted = inside.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, batch)
    counted.remove()
    assert len(calls) == 2, "the block must have been computed again in backward"
    torch.testing.assert_close(checkpointed, plain)


def test_batch_without_scored_positions_still_has_a_graph():
    batch = random_batch()
    nothing = dataclasses.replace(batch, scored=torch.zeros_like(batch.scored))
    hidden, layers = tiny_llama(2, 32)(nothing, [1])
    assert hidden.shape == (0, 32)
    assert layers[1].shape == (0, 32)
    hidden.sum().backward()
