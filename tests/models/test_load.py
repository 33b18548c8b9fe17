import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForMaskedLM
from transformers.utils import logging

from limbeck.errors import ConfigError, DataError
from limbeck.models import (
    ModelSource,
    load_model,
    model_facts,
    new_model,
    save_student,
)
from limbeck.models.attention import SEGMENTS
from limbeck.models.source import refuse_unknown_kinds
from tests.models.tiny import tensors_hash, tiny_config, tiny_llama, tiny_tokenizer

CPU = torch.device("cpu")


def load(path, **more):
    return load_model(ModelSource(str(path), **more), device=CPU, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_student(tiny_llama(2, 32), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_saved_model_loads_bit_for_bit_in_eval_mode(folder):
    model = load(folder)
    assert tensors_hash(model) == tensors_hash(tiny_llama(2, 32))
    assert not model.training
    assert model.config._attn_implementation == SEGMENTS


def test_model_loads_in_the_number_format_asked_for(folder):
    source = ModelSource(str(folder))
    assert load_model(source, device=CPU, dtype=torch.bfloat16).hf_model.dtype == torch.bfloat16


def test_attention_setting_a_model_brings_along_is_not_followed(folder):
    change_config(folder, _attn_implementation_internal="someone/kernel", attn_implementation="x/y")
    assert load(folder).config._attn_implementation == SEGMENTS


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"a \.gguf file that exists"):
        load(tmp_path / "nothing.gguf")


def test_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold config\.json"):
        load(tmp_path)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="must be in safetensors"):
        load(folder)


def test_cut_weights_are_damaged_data(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        load(folder)


def test_weights_that_do_not_fill_the_model_are_refused(folder):
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(DataError, match=r"must fill the whole model.*model\.layers\.2"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    change_config(folder, intermediate_size=48)
    with pytest.raises(DataError, match=r"is \[.*\] in the file and \[.*\] in config\.json"):
        load(folder)


def test_broken_configuration_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json must hold a JSON object.*line 1"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json must hold a JSON object.*it is no object"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(ConfigError, match=r"configuration of.*no-such-family"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("mixtral", "num_local_experts = 8.*not support mixtures of experts"),
        ("qwen2_moe", "num_experts = 60.*not support mixtures of experts"),
        ("deepseek_v3", "n_routed_experts = 256.*not support mixtures of experts"),
        ("gemma3", "vision_config.*several modalities"),
        ("llava", "vision_config.*several modalities"),
        ("qwen2_audio", "audio_config.*several modalities"),
        ("t5", "causal language model.*not one"),
        ("vit", "causal language model.*not one"),
    ],
)
def test_kinds_without_an_entry_are_refused_with_what_is_missing(family, missing):
    with pytest.raises(ConfigError, match=missing):
        refuse_unknown_kinds("some/model", AutoConfig.for_model(family))


def test_quantised_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="is quantised"):
        load(folder)


def test_remote_code_needs_a_pinned_commit():
    with pytest.raises(ConfigError, match="40-digit commit"):
        load("someone/model", trust_remote_code=True, revision="main")


def test_remote_code_does_not_run_unasked(folder):
    (folder / "configuration_own.py").write_text("raise SystemExit('ran')\n")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load(folder)


def test_facts_name_the_weights_and_the_shape(folder):
    source = ModelSource(str(folder))
    facts = model_facts(source, load(folder))
    assert (facts["layers"], facts["width"]) == (2, 32)
    assert facts["parameters"] == tiny_llama(2, 32).num_parameters
    assert facts["bytes"] == 4 * facts["parameters"]
    assert json.loads(json.dumps(facts)) == facts
    path = folder / "model.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    assert model_facts(source, load(folder))["weights_sha256"] != facts["weights_sha256"]


def test_the_hash_of_tensors_changes_with_one_bit():
    model = tiny_llama(1, 32)
    before = tensors_hash(model)
    with torch.no_grad():
        weight = model.hf_model.lm_head.weight
        weight[0, 0] = math.nextafter(weight[0, 0].item(), 10) + 1e-7
    assert tensors_hash(model) != before


def test_new_model_depends_on_its_seed_and_leaves_the_generator_alone():
    def make(seed):
        return new_model(tiny_config("llama"), device=CPU, dtype=torch.float32, seed=seed)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = make(1)
    assert torch.equal(torch.rand(1), expected)
    assert tensors_hash(first) == tensors_hash(make(1))
    assert tensors_hash(first) != tensors_hash(make(2))


def test_configuration_of_no_possible_model_is_refused():
    config = tiny_config("llama")
    config.num_attention_heads = 0
    with pytest.raises(ConfigError, match="No llama model can be made"):
        new_model(config, device=CPU, dtype=torch.float32, seed=0)


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path):
    config = BertConfig(
        vocab_size=70, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"\(bert\) is not one"):
        load(tmp_path)


def test_loading_and_saving_print_nothing_and_leave_transformers_as_it_was(folder, capfd, tmp_path):
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    model = load(folder)
    save_student(model, tiny_tokenizer(70), tmp_path / "saved")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
