"""Queries, keys and values of chosen layers: true ones, of those layers only, in every family."""

import gc
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from limbeck.errors import ConfigError
from limbeck.models import captured_projections, checkpoint_activations
from tests.models.tiny import FAMILIES, random_batch, tiny_llama, tiny_model


def captured(model, batch, layers):
    with captured_projections(model, batch, layers) as found:
        model(batch)
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
def test_every_family_gives_queries_keys_and_values_of_their_widths(family):
    model, batch = tiny_model(family, layers=3), random_batch()
    found = captured(model, batch, {2, 0})
    assert list(found) == [0, 2]
    groups = 2 if family not in ("gpt2", "gpt_neox") else 4
    for each in found.values():
        widths = [part.shape for part in each]
        n, size = int(batch.num_scored()), each.query.shape[1] // 4
        assert widths == [(n, 4 * size), (n, groups * size), (n, groups * size)]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_attention_made_of_them_is_the_models_own(family):
    """A token alone attends to itself, so what attention makes of it is its value."""
    model, batch = tiny_model(family, layers=1), random_batch(rows=4, length=1)
    batch.scored[:] = True
    block, outputs = model.blocks[0], []
    names = ("o_proj", "c_proj", "dense")
    (last,) = [m for n, m in block.named_modules() if "att" in n and n.rpartition(".")[2] in names]
    handle = last.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    value = captured(model, batch, [0])[0].value
    handle.remove()
    heads = outputs[0].reshape(4, 4, -1)
    own = value.reshape(4, -1, heads.shape[-1])
    torch.testing.assert_close(heads, own.repeat_interleave(4 // own.shape[1], 1))


def test_only_the_chosen_layers_are_kept_and_no_hook_stays():
    model, batch, seen = tiny_llama(4, 32), random_batch(), []
    handles = [
        module.register_forward_hook(lambda _m, _a, out: seen.append(weakref.ref(out)))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.hf_model.lm_head
    ]
    with torch.no_grad():
        found = captured(model, batch, [3])
    for handle in handles:
        handle.remove()
    gc.collect()
    assert len(seen) == 4 * 7
    assert not any(ref() is not None for ref in seen), "whole outputs are gone, only rows are kept"
    assert sum(part.numel() for part in found[3]) == int(batch.num_scored()) * (32 + 16 + 16)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_pass_through_them_under_activation_checkpointing():
    gradients = []
    for how in ("none", "selective", "full"):
        model, batch = tiny_llama(2, 32).train(), random_batch()
        checkpoint_activations(model, how)
        with captured_projections(model, batch, [1]) as found:
            hidden, _ = model(batch)
        (hidden.square().sum() + found[1].key.square().sum()).backward()
        gradients.append([p.grad for p in model.decoder.parameters()])
    for plain, *checkpointed in zip(*gradients, strict=True):
        for each in checkpointed:
            torch.testing.assert_close(each, plain)


def test_a_layout_without_an_entry_is_refused():
    model = tiny_llama(1, 32)
    del model.blocks[0].self_attn.k_proj
    assert isinstance(model.hf_model, PreTrainedModel)
    with (
        pytest.raises(ConfigError, match=r"block 0 of this llama model has q_proj, v_proj of them"),
        captured_projections(model, random_batch(), [0]),
    ):
        pass
