"""A run whose student is its teacher under adapters."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.distributed import World, world
from limbeck.errors import ConfigError
from limbeck.experiment.parts import gather_parts
from limbeck.models import ModelSource, load_model
from limbeck.train import train_step
from tests.distributed.processes import live
from tests.experiment.test_trainable import stopping_after
from tests.experiment.tiny_run import run, steps_of, write_recipe
from tests.train.toy import Listener

SHARED = ("student={type: shared}", "trainable.lora={rank: 4}", "objective.alpha=0.3")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_a_run_in_one_copy_of_the_weights_never_changes_its_teacher(tmp_path, monkeypatch):
    """And its second trial, which begins anew, shares them as well."""
    from limbeck.train import train

    config = limbeck.load(write_recipe(tmp_path), [*SHARED, "evaluate.baseline=cross_entropy"])
    source = ModelSource(config.teacher["path"])
    alone = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    ids, heard = torch.arange(24).view(2, 12), []
    with limbeck.assemble(config) as whole:
        teacher = whole.parts.teacher.model
        weights = {p.data_ptr() for p in teacher.parameters()}

        def watched(setup):
            def hear(record):
                if record["kind"] == "step":
                    with torch.no_grad():
                        assert torch.equal(teacher.logits(ids), alone.logits(ids))
                    mine = {p.data_ptr() for p in setup.distiller.parameters()}
                    assert weights <= mine
                    heard.append(record["step"])

            object.__setattr__(setup, "sinks", [*setup.sinks, Listener(hear)])
            return train(setup)

        monkeypatch.setattr("limbeck.experiment.trials.train", watched)
        outcome = whole.train()
    assert heard == [1, 2, 3, 4, 5, 6] * 2
    assert not (tmp_path / "run" / "initial").exists()
    student = AutoModelForCausalLM.from_pretrained(outcome.student).state_dict()
    first = load_file(tmp_path / "teacher" / "model.safetensors")
    assert student.keys() == first.keys()
    assert not torch.equal(student["model.layers.0.mlp.up_proj.weight"],
                           first["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


def test_a_shared_student_resumes_to_the_same_bits(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    wanted = run(write_recipe(tmp_path / "whole"), *SHARED).student / "model.safetensors"
    path = write_recipe(tmp_path / "halves")
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.experiment.trials.train", stopping_after(3))
        with pytest.raises(KeyboardInterrupt):
            run(path, *SHARED)
    found = run(path, *SHARED, resume=True).student / "model.safetensors"
    assert len(steps_of(tmp_path / "halves" / "run")) == 6
    assert found.read_bytes() == wanted.read_bytes()


def test_without_adapters_a_shared_student_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"student\.type: .*needs trainable\.lora.*none"):
        limbeck.load(write_recipe(tmp_path), ["student={type: shared}"])


def test_several_ranks_cannot_share(tmp_path):
    config = limbeck.load(write_recipe(tmp_path), list(SHARED))
    with pytest.raises(ConfigError, match=r"student\.type: .*needs one process, and there are 2"):
        gather_parts(config, World(0, 2, torch.device("cpu")))


def test_a_copy_starts_as_its_teacher(tmp_path):
    outcome = run(write_recipe(tmp_path), "student={type: copy}", "objective.alpha=0")
    trials = outcome.evaluation["trials"]
    assert trials["initial"]["forward_kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert (
        trials["distilled"]["cross_entropy"]["value"] < trials["teacher"]["cross_entropy"]["value"]
    )


def alone_on_a_mesh(path):
    with world(torch.device("cpu"), "always") as here:
        config = limbeck.load(path, list(SHARED))
        parts = gather_parts(config, here)
        distiller = parts.distiller(parts.take_student(path), config.objective)
        batch = parts.data.batch([0, 1])
        optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
        teacher = parts.teacher
        before = teacher.signal(batch).distribution
        outcome = train_step(distiller, teacher, [optimizer], [batch], here)
        assert outcome.is_finite
        after = teacher.signal(batch).distribution
        assert torch.equal(before.head(before.hidden), after.head(after.hidden))
        both = {p.data_ptr() for p in teacher.model.parameters()}
        assert both <= {p.data_ptr() for p in distiller.parameters()}


@pytest.mark.slow
def test_on_a_mesh_of_one_the_weights_are_one_copy_too(tmp_path):
    """What a single GPU runs."""
    assert live(alone_on_a_mesh, write_recipe(tmp_path)) == 0
