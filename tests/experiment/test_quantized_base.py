"""QLoRA: adapters over a student whose frozen blocks are kept in 8 or 4 bits."""

import json
import sys
from importlib.util import find_spec

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.config.trainable import LowRankConfig, TrainableConfig
from limbeck.errors import ConfigError
from limbeck.models import make_trainable, num_bytes, pack, plain_weights, save_student
from limbeck.models.freezing import frozen_hash
from tests.commands.test_check import run as check
from tests.experiment.test_trainable import run, stopping_after
from tests.experiment.tiny_run import write_model, write_recipe
from tests.models.tiny import tiny_model, tiny_tokenizer
from tests.tokenizers.small import small

needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs limbeck[quantized]"
)
CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def recipe(folder, bits="4bit"):
    """A recipe with a pretrained student, whose base model is on disk."""
    base = write_model(folder / "base", rows=len(small()), layers=2, seed=1)
    path = write_recipe(folder)
    return path, (f"student={{type: pretrained, path: {base}}}", f"trainable.lora={LORA[bits]}")


LORA = {bits: f"{{rank: 4, quantize: {bits}}}" for bits in ("4bit", "8bit")}


def packed_model(bits, family="llama"):
    model = tiny_model(family, width=64, tie_word_embeddings=False)
    make_trainable(model, TrainableConfig(lora=LowRankConfig(rank=4)), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = num_bytes(model), model.num_parameters, frozen_hash(model)
    pack(model, bits, CPU, torch.float32)
    return model, before


@needs_library
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize(("bits", "far"), [("8bit", 0.1), ("4bit", 1e-5)])
def test_the_merged_student_computes_what_the_packed_one_does(family, bits, far, tmp_path):
    model, (size, parameters, frozen) = packed_model(bits, family)
    assert num_bytes(model) < 0.6 * size
    assert model.num_parameters == parameters
    assert frozen_hash(model) != frozen
    names = {name for name, _ in model.named_parameters()}
    assert all(
        "lora" in n for n in names if ".layers." in n and "norm" not in n and "bias" not in n
    )
    save_student(model, tiny_tokenizer(), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        found, wanted = plain(IDS).logits, model.logits(IDS)
    # With 8 bits bitsandbytes rounds a layer's inputs too.
    assert (found[..., : wanted.shape[-1]] - wanted).norm() < far * wanted.norm()
    assert plain_weights(model).keys() == plain.state_dict().keys()


@needs_library
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_gradients_reach_adapters_of_the_lowest_layer(bits):
    model, _ = packed_model(bits)
    model.logits(IDS).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
    whole, _ = packed_model(bits)
    for name, layer in whole.packed.items():
        made = nn.Linear(layer.weight().shape[1], len(layer.weight()), bias=False)
        made.weight = nn.Parameter(layer.weight(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(whole.hf_model.get_submodule(parent), last, made)
    whole.logits(IDS).square().mean().backward()
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            off = (gradients[name] - parameter.grad).norm()
            assert off < (0.4 if bits == "8bit" else 1e-4) * parameter.grad.norm(), name


@pytest.mark.slow
@needs_library
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize("more", [(), ("parallel={shard: always, compute_dtype: bfloat16}",)])
def test_a_run_leaves_a_merged_student_and_its_adapter(more, tmp_path):
    path, overrides = recipe(tmp_path)
    outcome = run(path, *overrides, *more)
    trials = outcome.evaluation["trials"]
    assert trials["distilled"]["forward_kl"]["value"] < trials["initial"]["forward_kl"]["value"]
    with limbeck.assemble(limbeck.load(path, overrides)) as whole:
        again = whole.evaluate()["trials"]["distilled"]["forward_kl"]["value"]
    close = 1e-2 if more else 1e-4
    assert again == pytest.approx(trials["distilled"]["forward_kl"]["value"], rel=close)
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(outcome.student / "adapter")
    assert {n.rpartition(".")[2] for n, _ in opened.named_parameters()}


@pytest.mark.slow
@needs_library
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    path, overrides = recipe(tmp_path / "whole")
    wanted = run(path, *overrides).student / "model.safetensors"
    path, overrides = recipe(tmp_path / "halves")
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.experiment.trials.train", stopping_after(3))
        with pytest.raises(KeyboardInterrupt):
            run(path, *overrides)
    found = run(path, *overrides, resume=True).student / "model.safetensors"
    assert found.read_bytes() == wanted.read_bytes()


@pytest.mark.slow
@needs_library
def test_both_trials_begin_with_the_same_student(tmp_path):
    path, overrides = recipe(tmp_path)
    run(path, *overrides, "evaluate.baseline=cross_entropy", "objective.alpha=0.0")
    weights = [
        (folder / "student" / "model.safetensors").read_bytes()
        for folder in (tmp_path / "run", tmp_path / "run" / "stages" / "cross_entropy")
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
@needs_library
def test_check_passes_and_plans_fewer_bytes(tmp_path):
    path, overrides = recipe(tmp_path)
    plans = [
        json.loads(check(path, "--json", *overrides, *more))["plan"]
        for more in ((), ("trainable.lora.quantize=null",))
    ]
    packed, whole = (plan["memory_bytes"]["student"] for plan in plans)
    assert packed < whole
    assert plans[0]["parameters"] == plans[1]["parameters"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("student={type: shared}",), r"lora\.quantize: a shared student's frozen weights are"),
        (("trainable.lora.dora=true",), r"lora\.quantize: DoRA divides by the norms of whole"),
        (
            ("trainable.lora.quantize=2bit",),
            r"lora\.quantize: must be '8bit' or '4bit', got '2bit'",
        ),
    ],
)
def test_what_a_quantised_base_cannot_do_is_refused(changes, message, tmp_path):
    path, overrides = recipe(tmp_path)
    with pytest.raises(ConfigError, match=message):
        limbeck.load(path, [*overrides, *changes])


def test_without_the_library_the_option_and_the_extra_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    path, overrides = recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"lora\.quantize needs bits.*limbeck\[quantized\]"):
        limbeck.assemble(limbeck.load(path, overrides))
