import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from limbeck.batch import Batch, Window
from limbeck.config import ObjectiveConfig
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller, attention
from limbeck.teachers import LocalTeacher
from tests.models.tiny import FAMILIES, VOCABULARY, tiny_llama, tiny_model, tiny_tokenizer

LENGTHS = (5, 1, 9)
META = torch.device("meta")


def window(length: int, document: int) -> Window:
    tokens = np.random.default_rng(document).integers(0, VOCABULARY, length + 1)
    return Window(tokens, np.arange(length) != 1, document)


def packed_batch() -> Batch:
    return Batch.packed([[window(6, 0), window(5, 1)], [window(9, 2)]])


def dense_attention(query, key, value, lengths, window):
    """Softmax over the whole row, with a mask of T x T, in float64."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    back = place[:, None] - place
    seen = (segment[:, None] == segment) & (back >= 0) & (back < (window or math.inf))
    repeat = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeat, 1) for each in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, value)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_in_each_segment_is_masked_attention(window, groups):
    n = sum(LENGTHS)
    shapes = [(n, 4, 8), (n, groups, 8), (n, groups, 8)]
    tokens = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    mine = attention.one_by_one(*tokens, borders, 0.0, None, window)
    reference = dense_attention(*tokens, LENGTHS, window)
    torch.testing.assert_close(mine, reference)
    seed = torch.randn_like(reference)
    for ours, theirs in zip(
        torch.autograd.grad(mine, tokens, seed),
        torch.autograd.grad(reference, tokens, seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 16])
def test_the_varlen_kernel_is_attention_segment_by_segment(window):
    device = torch.device("cuda")
    assert attention.has_varlen(device, torch.bfloat16, 64)
    lengths = (300, 1, 77)
    shapes = [(sum(lengths), heads, 64) for heads in (8, 2, 2)]
    tokens = [
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]
    borders = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    both = [
        attend(*tokens, borders, 0.0, None, window)
        for attend in (attention.varlen, attention.one_by_one)
    ]
    torch.testing.assert_close(*both, atol=0.03, rtol=0.03)
    seed = torch.randn_like(both[0])
    for ours, theirs in zip(
        *(torch.autograd.grad(each, tokens, seed) for each in both), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - attention.SOFTCAPPED))
def test_packed_rows_have_the_gradients_of_a_mask(family):
    """Transformers derives the mask from position_ids for its own attention functions."""
    batch, gradients = packed_batch(), []
    for name in (attention.SEGMENTS, "sdpa"):
        model = tiny_model(family)
        model.hf_model.set_attn_implementation(name)
        hidden, _ = model(batch)
        (hidden**3).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_rows_of_one_document_have_no_borders_whatever_their_padding():
    apart = Batch.packed([[window(6, 0)], [window(9, 1)], []])
    assert len(apart.segment_borders) == 0
    # The second row's padding is a segment of its own, because the first row has two.
    assert packed_batch().segment_borders.tolist() == [0, 6, 11, 20, 22]


def test_a_saved_model_names_no_attention_of_limbeck(tmp_path):
    tiny_llama(2, 32).hf_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert attention.SEGMENTS not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


OBJECTIVES = {
    "forward KL": {},
    "a divergence that sorts": {"divergence": "adaptive_kl"},
    "hidden states": {"extra": ({"type": "hidden_state", "weight": 1.0},)},
    "relations within a document": {"extra": ({"type": "relations", "weight": 1.0},)},
    "relations of heads": {"extra": ({"type": "attention_relations", "weight": 1.0, "heads": 4},)},
    "chosen positions": {"positions": {"type": "teacher_entropy", "share": 0.3}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_micro_batch_waits_for_its_device(name, monkeypatch):
    """On the meta device nothing can be read, as nothing should be of a GPU's: it would wait."""
    monkeypatch.setattr(attention, "has_varlen", lambda device, dtype, head_size: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta has none
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    shapes = PairShapes(2, 2, 32, 32, LayerMap.uniform(2, 2))
    objective = build_objective(ObjectiveConfig(**OBJECTIVES[name]), shapes, head_budget_mb="auto")
    student, teacher = (tiny_llama(2, 32).to(META, torch.bfloat16) for _ in range(2))
    teacher = LocalTeacher(teacher, objective.needs)
    distiller = Distiller(student, objective.to(META))
    for rows in (packed_batch(), Batch.packed([[window(6, 0)], [window(9, 1)]])):
        batch = rows.to(META)
        signal = teacher.signal(batch)
        loss, _ = distiller(batch, signal, torch.tensor(5, device=META))
        loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        batch.target_ids[batch.scored]
