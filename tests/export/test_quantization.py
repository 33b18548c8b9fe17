from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from limbeck.config.trainable import TrainableConfig
from limbeck.export.gguf import Gguf
from limbeck.export.importance import importance_of
from limbeck.export.llama_cpp import quantized
from limbeck.export.quantization import MIXTURES, choose
from limbeck.models import ModelSource, load_model, make_trainable, plain_weights, save_student
from tests.export.tiny_students import made, parity_of

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q5_0, Kind.Q5_1])
def test_blocks_are_those_of_the_gguf_package(kind):
    weights = RNG.standard_normal((8, 64)).astype(np.float32)
    np.testing.assert_array_equal(quantized(weights, kind), gguf.quants.quantize(weights, kind))


@pytest.mark.parametrize(
    ("kind", "bound"), [(Kind.Q4_K, 0.09), (Kind.Q5_K, 0.05), (Kind.Q6_K, 0.025)]
)
def test_quantised_blocks_decode_to_nearly_the_weights(kind, bound):
    weights = RNG.standard_normal((8, 512)).astype(np.float32)
    again = gguf.quants.dequantize(quantized(weights, kind), kind)
    assert np.sqrt(np.mean((again - weights) ** 2)) < bound


def kinds(quantize, suffix, layers=16, width=256):
    """Layers of which format, of a matrix of every block."""
    shape = (width, width)
    names = [f"blk.{i}.{suffix}.weight" for i in range(layers)]
    return [choose(n, shape, quantize, layers, is_head=False).kind.name for n in names]


def test_q4_k_m_gives_more_bits_where_llama_cpp_does():
    more = [i for i, kind in enumerate(kinds("q4_k_m", "attn_v")) if kind == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    assert kinds("q4_k_m", "ffn_down") == kinds("q4_k_m", "attn_v")
    assert set(kinds("q4_k_m", "attn_q")) == {"Q4_K"}
    assert set(kinds("q4_k_m", "attn_qkv")) == {"Q5_K"}
    assert set(kinds("q5_k_m", "attn_qkv")) == {"Q6_K"}


def test_heads_embeddings_and_vectors_have_formats_of_their_own():
    head = choose("output.weight", (1000, 256), "q4_k_m", 4, is_head=True)
    assert head.kind == Kind.Q6_K
    assert choose("token_embd.weight", (1000, 256), "q4_k_m", 4, is_head=False).kind == Kind.Q4_K
    assert choose("token_embd.weight", (1000, 96), "q4_k_m", 4, is_head=True).kind == Kind.Q8_0
    assert choose("blk.0.attn_norm.weight", (256,), "q4_k_m", 4, is_head=False).kind == Kind.F32
    assert choose("position_embd.weight", (8, 256), "q8_0", 4, is_head=False).kind == Kind.F32


def test_rows_not_divisible_by_the_block_size_use_a_fallback_format():
    assert set(kinds("q4_k_m", "attn_q", width=96)) == {"Q5_0"}
    assert set(kinds("q5_k_m", "attn_q", width=96)) == {"Q5_1"}
    assert set(kinds("q6_k", "attn_q", width=96)) == {"Q8_0"}
    assert set(kinds("q4_k_m", "attn_q", width=24)) == {"F16"}
    choice = choose("blk.0.attn_q.weight", (96, 96), "q4_k_m", 4, is_head=False)
    assert choice.instead_of == Kind.Q4_K


@pytest.mark.parametrize("quantize", sorted(MIXTURES))
def test_every_format_has_a_small_kl_to_the_student(quantize, tmp_path):
    student = made(width=256, num_attention_heads=8, initializer_range=0.05)
    parity = parity_of(student, tmp_path, quantize=quantize)
    assert parity.passed, parity
    assert parity.mean_kl < 0.05


@pytest.mark.parametrize("quantize", ["q4_0", "q8_0"])
def test_the_file_holds_the_rounded_weights_that_were_trained(quantize, tmp_path):
    student = made(width=64, num_attention_heads=4, initializer_range=0.05)
    make_trainable(student.model, TrainableConfig(quantize=quantize), 0)
    save_student(student.model, student.tokenizer, tmp_path / "saved")
    source = ModelSource(str(tmp_path / "saved"))
    saved = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    saved.vocabulary_size = student.model.vocabulary_size
    exporter = Gguf(quantize=quantize)
    for name, model in (("trained", student.model), ("saved", saved)):
        file = exporter.export(model, student.tokenizer, tmp_path / f"{name}.gguf")
        stored = {t.name: t for t in gguf.GGUFReader(file.path).tensors}["blk.1.ffn_down.weight"]
        found = gguf.quants.dequantize(stored.data, stored.tensor_type)
        own = plain_weights(student.model)["model.layers.1.mlp.down_proj.weight"]
        np.testing.assert_array_equal(found, own.numpy())


def test_more_bits_give_a_smaller_kl(tmp_path):
    student = made(width=256, num_attention_heads=8, initializer_range=0.1)
    order = ("q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16")
    kl = [parity_of(student, tmp_path, quantize=quantize).mean_kl for quantize in order]
    assert kl == sorted(kl, reverse=True)


def test_importance_is_the_mean_square_of_inputs():
    student = made("gpt2")
    windows = [[1, 2, 3], [4, 5, 6, 7]]
    importance = importance_of(student.model, windows)
    assert len(importance) == 2 * 4
    norm = student.model.blocks[0].ln_1
    with torch.no_grad():
        embedded = [
            student.model.decoder.wte(torch.tensor(w)) + student.model.decoder.wpe.weight[: len(w)]
            for w in windows
        ]
        expected = norm(torch.cat(embedded)).square().mean(0)
    found = importance["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_columns_with_large_importance_have_the_smallest_error():
    weights = RNG.standard_normal((64, 256)).astype(np.float32)
    importance = np.full(256, 1e-3, dtype=np.float32)
    importance[::4] = 10.0

    def error(blocks):
        again = gguf.quants.dequantize(blocks, Kind.Q4_K)
        return float(np.sum((again - weights) ** 2 * importance))

    assert error(quantized(weights, Kind.Q4_K, importance)) < 0.8 * error(
        quantized(weights, Kind.Q4_K)
    )


def test_a_real_models_formats_are_those_of_llama_cpps_quantiser():
    """SmolLM2-135M with 15 layers as llama_model_quantize cut it (llama-cpp-python 0.3.36)."""
    inputs = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), 576)
    inputs["ffn_down"] = 1536
    found = Counter(
        choose(f"blk.{i}.{name}.weight", (64, width), "q4_k_m", 15, is_head=False).kind.name
        for i in range(15)
        for name, width in inputs.items()
    )
    found[choose("token_embd.weight", (64, 576), "q4_k_m", 15, is_head=True).kind.name] += 1
    assert found == {"Q5_0": 83, "Q8_0": 8, "Q4_K": 8, "Q6_K": 7}
