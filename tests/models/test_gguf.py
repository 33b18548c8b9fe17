import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from limbeck.errors import ConfigError
from limbeck.models import ModelSource, load_model, model_facts, save_student
from limbeck.models.gguf import decimal
from tests.models.tiny import tensors_hash, tiny_llama, tiny_tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def add_words(writer):
    """A list of tokens, and no tokenizer."""
    writer.add_token_list([f"w{i}" for i in range(96)])


def write_gguf(path, layers=2, width=32, vocabulary=96, add_tokens=add_words):
    """A tiny Llama as llama.cpp would write it, its matrices in 4 bits."""
    model = tiny_llama(layers, width, vocabulary=vocabulary)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    add_tokens(writer)
    for name, tensor in model.hf_model.state_dict().items():
        own = name.removesuffix(".weight")
        own = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }.get(own, own)
        if own.startswith("model.layers."):
            number, rest = own.removeprefix("model.layers.").split(".", 1)
            own = f"blk.{number}.{NAMES[rest]}"
        values = tensor.float().numpy()
        if values.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{own}.weight", quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{own}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path):
    source = ModelSource(str(path))
    return load_model(source, device=torch.device("cpu"), dtype=torch.float32)


def test_gguf_becomes_a_plain_model_that_can_be_saved(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    model = load(tmp_path / "tiny.gguf")
    assert model.config.rms_norm_eps == 1e-5
    norm = tiny_llama(2, 32).hf_model.model.norm.weight
    torch.testing.assert_close(model.hf_model.model.norm.weight, norm)
    save_student(model, tiny_tokenizer(), tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert tensors_hash(again) == tensors_hash(model)
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_gguf_is_named_by_the_hash_of_its_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    model = load(tmp_path / "tiny.gguf")
    facts = model_facts(ModelSource(str(tmp_path / "tiny.gguf")), model)
    assert len(facts["weights_sha256"]) == 64
    assert facts["layers"] == 2


def test_broken_gguf_is_refused(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    with pytest.raises(ConfigError, match="cannot be read as a GGUF model"):
        load(tmp_path / "broken.gguf")


def test_cut_gguf_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for share in (0.2, 0.6, 0.9):
        (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ConfigError, match="cannot be read as a GGUF model"):
            load(tmp_path / "cut.gguf")


def test_decimals_do_not_change_float64():
    assert decimal(0.1) == 0.1
    assert decimal(float(np.float32(0.1))) == 0.1
    assert decimal(1e6) == 1e6
