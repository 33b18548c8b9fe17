"""Adapters of low rank: what they compute, what is trained of them, and what they become."""

import sys

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from limbeck.config import ObjectiveConfig
from limbeck.config.trainable import LowRankConfig, TrainableConfig
from limbeck.errors import ConfigError
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller, prove_head, save_adapters, save_student
from limbeck.models.adapters import merged
from limbeck.models.freezing import make_trainable, trained_facts
from limbeck.teachers.local import LocalTeacher
from tests.models.tiny import VOCABULARY, random_batch, tiny_model, tiny_tokenizer

EACH = [
    ("llama", {}),
    ("llama", {"dora": True}),
    ("gemma2", {}),
    ("gpt2", {"targets": ("c_attn", "c_proj")}),
    ("gpt2", {"targets": ("c_attn",), "dora": True}),
    ("gpt_neox", {"dora": True}),
]


def adapted(family="llama", seed=0, moved=True, tied=False, **lora):
    """A model with adapters that, as after some training, change something."""
    model = tiny_model(family, tie_word_embeddings=tied)
    config = TrainableConfig(lora=LowRankConfig(**{"rank": 4, "alpha": 8.0, **lora}))
    make_trainable(model, config, seed)
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.logits(ids)


IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize(("family", "lora"), EACH)
def test_new_adapters_change_nothing(family, lora):
    torch.testing.assert_close(
        logits(adapted(family, moved=False, **lora), IDS),
        logits(tiny_model(family, tie_word_embeddings=False), IDS),
    )


@pytest.mark.parametrize(("family", "lora"), EACH)
def test_the_saved_student_is_an_ordinary_model_with_the_same_logits(family, lora, tmp_path):
    model = adapted(family, **lora)
    before = logits(tiny_model(family, tie_word_embeddings=False), IDS)
    save_student(model, tiny_tokenizer(), tmp_path)
    assert not list(tmp_path.glob("*adapter*"))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        found = plain(IDS).logits
    wanted = logits(model, IDS)
    assert (wanted - before).abs().max() > 0.01, "or the adapters would not matter"
    # Merged, one product is rounded where two were: seen in the last bits of a large logit.
    assert (found - wanted).abs().max() < 3e-6 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize(("family", "lora"), EACH)
def test_saved_adapters_open_with_peft_over_the_base_model(family, lora, tmp_path):
    base = tiny_model(family, tie_word_embeddings=False)
    base.hf_model.save_pretrained(tmp_path / "base")
    model = adapted(family, **lora)
    config = LowRankConfig(**{"rank": 4, "alpha": 8.0, **lora})
    save_adapters(model, config, str(tmp_path / "base"), tmp_path / "adapter")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        found = opened(IDS).logits
    torch.testing.assert_close(found, logits(model, IDS))


@pytest.mark.parametrize(("family", "lora"), [*EACH, ("llama", {"targets": ("lm_head",)})])
def test_the_merged_weights_are_those_of_peft(family, lora):
    model = adapted(family, **lora)
    ours = merged(model.hf_model.state_dict(), model.adapters)
    tuner = peft.tuners.lora.LoraModel
    for name in model.adapters:
        model.hf_model.get_submodule(name).merge()
        torch.testing.assert_close(
            ours[f"{name}.weight"], model.hf_model.get_submodule(name).base_layer.weight
        )
    assert tuner.prefix == "lora_"
    assert ours.keys() == tiny_model(family, tie_word_embeddings=False).hf_model.state_dict().keys()


def test_a_tied_student_is_saved_tied(tmp_path):
    model = adapted(tied=True)
    save_student(model, tiny_tokenizer(), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, logits(model, IDS))


def test_only_adapters_are_trained():
    model = adapted(dora=True, targets=("q_proj",))
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_magnitude_vector"}
    facts = trained_facts(model, TrainableConfig(lora=LowRankConfig(rank=4)))
    assert facts["parameters"] == 2 * (4 * 32 + 32 * 4 + 32)
    assert facts["of"] == facts["parameters"] + tiny_model("llama").num_parameters
    assert facts["lora"]["layers"] == 2


def test_equal_seeds_give_equal_adapters_and_leave_the_generator_alone():
    torch.manual_seed(7)
    one, other, third = (adapted(moved=False, seed=seed) for seed in (3, 3, 4))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), third.parameters(), strict=True)
    )


def test_adapters_of_a_bfloat16_model_are_float32_and_so_is_what_is_saved(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    make_trainable(model, TrainableConfig(lora=LowRankConfig(rank=2)), 0)
    formats = {p.requires_grad: p.dtype for p in model.parameters()}
    assert formats == {False: torch.bfloat16, True: torch.float32}
    save_student(model, tiny_tokenizer(), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


def distil(model, temperature=2.0):
    """The loss of a batch, computed by the fused head, and the gradients it gives."""
    shapes = PairShapes(2, 2, model.width, 32, LayerMap.uniform(2, 2))
    recipe = ObjectiveConfig(alpha=0.7, temperature=temperature)
    distiller = Distiller(model, build_objective(recipe, shapes, head_budget_mb=1))
    teacher = LocalTeacher(tiny_model("llama", seed=9))
    batch = random_batch()
    loss, _ = distiller(batch, teacher.signal(batch), batch.num_scored())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distil_densely(model, temperature=2.0):
    """The same by whole logits of peft's own forward pass and autograd."""
    batch, teacher = random_batch(), tiny_model("llama", seed=9)
    ids = batch.input_ids
    student_logits = model.hf_model(ids, use_cache=False).logits[batch.scored]
    with torch.no_grad():
        teacher_logits = teacher.hf_model(ids, use_cache=False).logits[batch.scored]
    soft = torch.nn.functional.kl_div(
        torch.log_softmax(student_logits / temperature, -1),
        torch.log_softmax(teacher_logits / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    hard = torch.nn.functional.cross_entropy(student_logits, batch.targets())
    loss = 0.7 * temperature**2 * soft + 0.3 * hard
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "down_proj", "lm_head")])
def test_an_adapted_head_has_the_gradients_of_whole_logits(targets, dora):
    loss, gradients = distil(adapted(targets=targets, dora=dora))
    wanted, dense = distil_densely(adapted(targets=targets, dora=dora))
    torch.testing.assert_close(loss, wanted)
    assert gradients.keys() == dense.keys()
    for name, gradient in gradients.items():
        assert dense[name].abs().max() > 0
        torch.testing.assert_close(gradient, dense[name], atol=1e-5, rtol=1e-4)


def test_the_head_apart_computes_what_pefts_own_forward_pass_does():
    prove_head(adapted(targets=("lm_head", "up_proj"), dora=True))


class Made(TorchDispatchMode):
    """Counts products that have the shape of the head's weight, those in place included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.count += made.shape == (VOCABULARY, 32)
        return made


@pytest.mark.parametrize(
    ("targets", "products"), [((), 0), (("q_proj",), 0), (("q_proj", "lm_head"), 2)]
)
def test_no_gradient_of_a_frozen_head_is_computed(targets, products):
    """An adapted head has one, and B A; a head under adapters elsewhere has no such product."""
    with Made() as made:
        distil(adapted(targets=targets))
    assert made.count == products
    with Made() as made:
        distil(tiny_model("llama", tie_word_embeddings=False))
    assert made.count == 1, "the gradient of a trained head, or nothing was counted"


@pytest.mark.parametrize(
    ("lora", "tied", "message"),
    [
        (
            {"targets": ("q_prj",)},
            False,
            r"targets\[0\].*'q_prj' \(did you mean 'q_proj'\?\)\. It has: q_proj, k_proj, v_proj, "
            r"o_proj, gate_proj, up_proj, down_proj, lm_head",
        ),
        ({"rank": 33}, False, r"rank: must be at most 32, the narrower side of .*q_proj.*got 33"),
        ({"targets": ("lm_head",)}, True, r"lm_head of this llama student is its embedding too"),
        (
            {"targets": ("lm_head",), "dropout": 0.1},
            False,
            r"dropout: must be 0 where the head \(lm_head\) is adapted.*got 0\.1",
        ),
    ],
)
def test_impossible_adapters_are_refused(lora, tied, message):
    with pytest.raises(ConfigError, match=message):
        adapted(tied=tied, **lora)


def test_without_peft_the_error_names_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft.*pip install 'limbeck\[lora\]'"):
        adapted()
