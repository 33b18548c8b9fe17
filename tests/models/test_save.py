import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck.models import ModelSource, load_model, save_student
from tests.models.tiny import (
    FAMILIES,
    random_batch,
    tensors_hash,
    tiny_llama,
    tiny_model,
    tiny_tokenizer,
)

RELOAD = """
import pathlib, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
root = pathlib.Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
found = {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    # other families' folders are opened with tokenizers of their own, which this is not
    tokenizer = AutoTokenizer.from_pretrained(root / "tied")
    assert tokenizer.encode("w3 w5") == [3, 5]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False)
    with torch.no_grad():
        found[folder.name] = model(ids).logits
    assert model.dtype == torch.float32
assert not any(name.startswith("limbeck") for name in sys.modules)
save_file(found, root / "found.safetensors")
"""


def test_saved_students_give_equal_logits_without_limbeck(tmp_path):
    models = {
        "untied": tiny_llama(2, 32),
        "tied": tiny_llama(2, 32, tied=True),
        "gemma3_text": tiny_model("gemma3_text", layers=3, tie_word_embeddings=True),
        "gpt2": tiny_model("gpt2"),
        "phi": tiny_model("phi"),
        "qwen2": tiny_model("qwen2"),
    }
    ids = random_batch().input_ids.contiguous()
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    for name, model in models.items():
        save_student(model, tiny_tokenizer(), tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], check=True, env=environment, cwd=tmp_path
    )
    found = load_file(tmp_path / "found.safetensors")
    for name, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(found[name], model.hf_model(ids).logits, msg=name)


def reload(folder):
    source = ModelSource(str(folder))
    return load_model(source, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("prefix", ["", "hf_model.", "student.hf_model."])
@pytest.mark.parametrize("tied", [False, True])
def test_gathered_weights_are_saved_instead_of_the_models_own(tmp_path, prefix, tied):
    model, other = tiny_llama(2, 32, seed=0, tied=tied), tiny_llama(2, 32, seed=1, tied=tied)
    weights = {prefix + n: t.clone() for n, t in other.hf_model.state_dict().items()}
    if prefix.startswith("student"):
        weights["objective.state_terms.hidden.weight"] = torch.zeros(2, 2)
    save_student(model, tiny_tokenizer(), tmp_path / "s", weights=weights)
    assert tensors_hash(reload(tmp_path / "s")) == tensors_hash(other)
    assert ("lm_head.weight" in load_file(tmp_path / "s" / "model.safetensors")) != tied


def test_gathered_weights_must_be_those_of_the_model(tmp_path):
    weights = {"hf_model.model.norm.weight": torch.ones(32)}
    with pytest.raises(AssertionError, match=r"without .*lm_head\.weight"):
        save_student(tiny_llama(1, 32), tiny_tokenizer(), tmp_path / "s", weights=weights)


def test_padded_ids_are_suppressed_in_the_saved_student(tmp_path):
    model = tiny_llama(1, 32)
    model.vocabulary_size = 90
    save_student(model, tiny_tokenizer(), tmp_path / "s")
    settings = json.loads((tmp_path / "s" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == [90, 91, 92, 93, 94, 95]
    assert model.hf_model.generation_config.suppress_tokens is None


def test_contradicting_generation_settings_do_not_stop_a_student(tmp_path):
    model = tiny_llama(1, 32)
    model.hf_model.generation_config.temperature = 0.6
    model.hf_model.generation_config.do_sample = False
    save_student(model, tiny_tokenizer(), tmp_path / "s")
    settings = json.loads((tmp_path / "s" / "generation_config.json").read_text())
    assert settings["temperature"] == 0.6


def test_saved_configuration_names_no_place_of_this_machine(tmp_path):
    save_student(tiny_llama(1, 32), tiny_tokenizer(), tmp_path / "first")
    save_student(reload(tmp_path / "first"), tiny_tokenizer(), tmp_path / "second")
    for path in (tmp_path / "second").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_a_round_trip(tmp_path, family):
    model = tiny_model(family, tie_word_embeddings=False)
    save_student(model, tiny_tokenizer(), tmp_path / "s")
    assert tensors_hash(reload(tmp_path / "s")) == tensors_hash(model)
