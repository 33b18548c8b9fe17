"""A run that trains adapters, or some parts, only: a recipe's word for it, and what is saved."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.distributed import latest
from limbeck.errors import ConfigError
from limbeck.experiment import load
from limbeck.experiment.parts import base_of
from tests.experiment.tiny_run import steps_of, write_model, write_recipe
from tests.tokenizers.small import small


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_adapters_over_a_gguf_file_are_saved_merged_only(tmp_path):
    config = load(write_recipe(tmp_path))
    for path, base in (("folder", "folder"), ("file.gguf", None)):
        assert base_of(replace(config, student={"type": "pretrained", "path": path})) == base


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_adapters_are_saved_unmerged_beside_the_merged_student(tmp_path):
    base = write_model(tmp_path / "base", rows=len(small()), layers=2, seed=1)
    path = write_recipe(tmp_path, evaluate={"data": None})
    student = f"student={{type: pretrained, path: {base}}}"
    folder = run(path, "trainable.lora={rank: 4}", "optim.steps=2", student).student
    ids = torch.arange(12)[None]
    with torch.no_grad():
        opened = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        first = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    torch.testing.assert_close(opened, merged)
    assert not torch.equal(opened, first)


LORA = "trainable.lora={rank: 4, alpha: 8, dropout: 0.1}"
DORA = "trainable.lora={rank: 4, dora: true, targets: [q_proj, lm_head]}"


def run(path, *overrides, **options):
    with limbeck.assemble(limbeck.load(path, overrides)) as whole:
        return whole.train(**options)


@pytest.mark.parametrize("lora", [LORA, DORA])
def test_a_recipe_with_adapters_leaves_an_ordinary_student(lora, tmp_path):
    outcome = run(write_recipe(tmp_path), lora)
    trials = outcome.evaluation["trials"]
    assert trials["distilled"]["forward_kl"]["value"] < trials["initial"]["forward_kl"]["value"]
    names = load_file(outcome.student / "model.safetensors").keys()
    teacher = load_file(tmp_path / "teacher" / "model.safetensors").keys()
    assert names == {n for n in teacher if "layers.2." not in n and "layers.3." not in n}
    assert not (outcome.student / "adapter").exists(), "its base is on no disk"
    with limbeck.assemble(limbeck.load(tmp_path / "recipe.yaml", [lora])) as whole:
        again = whole.evaluate()["trials"]["distilled"]["forward_kl"]["value"]
    assert again == pytest.approx(trials["distilled"]["forward_kl"]["value"], rel=1e-5)


def test_the_run_says_how_much_is_trained(tmp_path):
    outcome = run(write_recipe(tmp_path), LORA)
    trained = json.loads((tmp_path / "run" / "provenance.json").read_text())["trained"]
    assert trained["lora"]["rank"] == 4
    assert trained["lora"]["layers"] == 14
    assert 0 < trained["parameters"] < trained["of"] / 2
    page = outcome.report.read_text()
    assert f"{trained['parameters']:,} of {trained['of']:,} parameters were trained" in page


def test_checkpoints_hold_what_is_trained_and_its_optimizer_only(tmp_path):
    run(write_recipe(tmp_path), LORA)
    (file,) = latest(tmp_path / "run" / "checkpoints").glob("*.safetensors")
    names = load_file(file).keys()
    assert names
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize(
    "trainable", [LORA, "trainable.freeze=[embeddings, layers.0]", "trainable.quantize=q4_0"]
)
def test_a_stopped_run_resumes_to_the_same_bits(trainable, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    term = "objective.extra=[{type: hidden_state, weight: 0.1, layer_map: uniform}]"
    pattern = write_recipe(tmp_path / "whole")
    wanted = run(pattern, trainable, term).student / "model.safetensors"
    path = write_recipe(tmp_path / "halves")
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.experiment.trials.train", stopping_after(3))
        with pytest.raises(KeyboardInterrupt):
            run(path, trainable, term)
    found = run(path, trainable, term, resume=True).student / "model.safetensors"
    assert "resumed at 2" in (tmp_path / "halves" / "run" / "metrics.jsonl").read_text()
    assert found.read_bytes() == wanted.read_bytes()


def stopping_after(steps):
    """The real training, which is cut off after so many steps."""
    from limbeck.train import train
    from tests.train.toy import Listener

    def stopped(setup):
        def hear(record):
            if record["kind"] == "step" and record["step"] == steps:
                raise KeyboardInterrupt

        object.__setattr__(setup, "sinks", [*setup.sinks, Listener(hear)])
        return train(setup)

    return stopped


def test_a_run_does_not_resume_with_other_frozen_weights(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    student = write_model(tmp_path / "student", rows=len(small()), layers=2, seed=3)
    recipe = write_recipe(tmp_path, student={"type": "pretrained", "path": str(student)})
    text = json.loads(recipe.read_text())
    del text["student"]["layers"]
    recipe.write_text(json.dumps(text))
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.experiment.trials.train", stopping_after(3))
        with pytest.raises(KeyboardInterrupt):
            run(recipe, LORA)
    write_model(tmp_path / "student", rows=len(small()), layers=2, seed=4)
    with pytest.raises(ConfigError, match="frozen_sha256: was"):
        run(recipe, LORA, resume=True)


@pytest.mark.parametrize("trainable", [DORA, "trainable.quantize=q4_0"])
def test_both_trials_begin_with_the_same_weights(tmp_path, trainable):
    run(write_recipe(tmp_path), trainable, "evaluate.baseline=cross_entropy", "objective.alpha=0.0")
    main = steps_of(tmp_path / "run")
    anchor = steps_of(tmp_path / "run" / "stages" / "cross_entropy")
    said = [[r["cross_entropy"] for r in records] for records in (main, anchor)]
    assert said[0] == pytest.approx(said[1], rel=1e-5)


def test_frozen_parts_stay_bit_for_bit(tmp_path):
    freeze = "trainable.freeze=[embeddings, norms, layers.0]"
    outcome = run(write_recipe(tmp_path), freeze, "student={type: depth, drop: []}")
    student = AutoModelForCausalLM.from_pretrained(outcome.student).state_dict()
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").state_dict()
    changed = {name for name in student if not torch.equal(student[name], teacher[name])}
    assert changed == {
        n for n in student if "norm" not in n and "embed" not in n and "layers.0." not in n
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon", "adafactor"])
def test_every_optimizer_trains_adapters(kind, tmp_path):
    run(write_recipe(tmp_path), LORA, f"optim.type={kind}", "evaluate.data=null")
    losses = [record["loss"] for record in steps_of(tmp_path / "run")]
    assert len(losses) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainable.lora={rank: 0}",), r"trainable\.lora\.rank: must be greater than 0, got 0"),
        (("trainable.lora={dropout: 1}",), r"dropout: must be .*less than 1, got 1"),
        (("trainable.lora={alpha: 0}",), r"alpha: must be greater than 0, got 0"),
        (("trainable.lora={ranks: 4}",), r"trainable\.lora\.ranks: no such option"),
        (
            ("trainable={lora: {}, freeze: [head]}",),
            r"trainable\.freeze: adapters freeze every weight",
        ),
        (
            ("trainable.freeze=[embedding]",),
            r"trainable\.freeze\[0\]: must be one of embeddings, head, norms, attention, "
            r"feed_forward, or layers\.3.*got 'embedding' \(did you mean 'embeddings'\?\)",
        ),
    ],
)
def test_errors_are_reported_before_a_model_loads(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        limbeck.load(write_recipe(tmp_path), overrides)


def test_an_unknown_target_is_refused_before_the_first_step(tmp_path):
    config = limbeck.load(write_recipe(tmp_path), ["trainable.lora={targets: [c_attn]}"])
    with pytest.raises(ConfigError, match=r"ends with 'c_attn'.*It has: q_proj, k_proj"):
        limbeck.assemble(config)
    assert not (tmp_path / "run").exists()


def test_muon_without_a_matrix_of_the_blocks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.type: muon serves the matrices.*none"):
        run(
            write_recipe(tmp_path),
            "optim.type=muon",
            "trainable.freeze=[attention, feed_forward]",
        )
