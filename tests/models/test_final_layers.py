"""Final norm and head read alone are those of the whole model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck.errors import ConfigError, DataError
from limbeck.models import ModelSource, load_final_layers, load_model
from limbeck.models.build import from_config
from tests.models.tiny import random_batch, tiny_config
from tests.teachers.waits import BlockingCopies

CPU = torch.device("cpu")


def write(folder, family, **options):
    """A tiny model with final norms that differ from one another in every column."""
    torch.manual_seed(0)
    model = from_config(tiny_config(family, **options), torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size="30KB")
    return ModelSource(str(folder))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox"]
)
def test_they_make_the_logits_of_the_model(tmp_path, family, is_tied):
    source = write(tmp_path, family, tie_word_embeddings=is_tied)
    model = load_model(source, device=CPU, dtype=torch.float32)
    model.vocabulary_size = 90
    batch, last = random_batch(vocabulary=90), model.num_layers - 1
    with torch.no_grad():
        hidden, outputs = model(batch, [last])
    layers = load_final_layers(source, device=CPU, dtype=torch.float32).cut(90)
    assert torch.equal(layers.last_hidden(outputs[last]), hidden)
    assert torch.equal(layers.head(hidden), model.head(hidden))


def test_states_are_copied_to_its_device_without_waiting(tmp_path):
    layers = load_final_layers(write(tmp_path, "llama"), device=CPU, dtype=torch.float32)
    head = layers.head._replace(weight=layers.head.weight.to("meta"))
    there = replace(layers, norm=layers.norm.to("meta"), head=head)
    with BlockingCopies() as copies:
        hidden = there.last_hidden(torch.randn(5, 32, dtype=torch.bfloat16))
    assert (hidden.device, hidden.dtype) == (torch.device("meta"), torch.float32)
    assert copies.found == []


def test_no_other_file_is_needed(tmp_path):
    source = write(tmp_path, "llama", tie_word_embeddings=False)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        names = load_file(file)
        if not {"lm_head.weight", "model.norm.weight"} & names.keys():
            file.unlink()
    assert load_final_layers(source, device=CPU, dtype=torch.float32).head.weight.shape == (96, 32)


def test_a_mixture_of_experts_and_a_quantised_model_have_them_too(tmp_path):
    options = {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    source = write(tmp_path, "qwen3_moe", head_dim=8, tie_word_embeddings=False, **options)
    layers = load_final_layers(source, device=CPU, dtype=torch.float32)
    assert layers.head.weight.shape == (96, 32)
    config = tmp_path / "config.json"
    facts = '{"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"},'
    config.write_text(config.read_text().replace("{", facts, 1))
    assert torch.equal(
        load_final_layers(source, device=CPU, dtype=torch.float32).head.weight, layers.head.weight
    )


def change(folder, name, make):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            value = make(tensors.pop(name))
            save_file(tensors if value is None else {**tensors, name: value}, file)


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("model.norm.weight", lambda _: None, "must hold model.norm.weight"),
        ("lm_head.weight", lambda w: w[:-1].contiguous(), r"lm_head.weight is \[95, 32\] and not"),
        ("lm_head.weight", lambda w: w / 0, "lm_head.weight of .* holds 3,072 that are not"),
        (
            "lm_head.weight",
            lambda w: w.to(torch.float8_e4m3fn),
            "of 16 bits or more, and hold F8_E4",
        ),
    ],
    ids=["absent", "another shape", "not finite", "8 bits"],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, name, make, match):
    source = write(tmp_path, "llama", tie_word_embeddings=False)
    index = tmp_path / "model.safetensors.index.json"
    change(tmp_path, name, make)
    if make(torch.zeros(2, 2)) is None:
        index.write_text(index.read_text().replace(f'"{name}"', '"model.other"'))
    with pytest.raises(DataError, match=match):
        load_final_layers(source, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("text", ["{}", "[]", "x"])
def test_an_index_that_names_nothing_is_refused(tmp_path, text):
    source = write(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match="names no weights"):
        load_final_layers(source, device=CPU, dtype=torch.float32)


def test_a_family_without_one_norm_after_its_blocks_is_refused(tmp_path):
    source = write(tmp_path, "opt", ffn_dim=64, word_embed_proj_dim=32)
    with pytest.raises(ConfigError, match=r"OPTForCausalLM \(opt\) must have one norm after"):
        load_final_layers(source, device=CPU, dtype=torch.float32)
