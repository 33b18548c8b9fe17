"""The plan's numbers against what training really holds."""

import dataclasses
from pathlib import Path

import pytest
import torch

from limbeck.checks import make_plan, plan_findings
from limbeck.checks.plan import checkpointed_bytes, run_micro_batch, state_bytes
from limbeck.config import CheckpointConfig, DataConfig, MemoryConfig, OptimConfig, RunConfig
from limbeck.distributed import adamw_8bit
from limbeck.errors import ConfigError
from limbeck.models import checkpoint_activations
from limbeck.train import make_optimizers
from tests.checks.cases import tiny_case, weights_of
from tests.models.tiny import tiny_model


def config(folder: Path, optimizer: str = "adamw", **memory: object) -> RunConfig:
    return RunConfig(
        teacher={"type": "online"},
        student={"type": "random"},
        data=DataConfig(type="text", path="none", sequence_length=40),
        optim=OptimConfig(type=optimizer, learning_rate=0.001, steps=10, tokens_per_step=200),
        memory=MemoryConfig(**memory),
        checkpoint=CheckpointConfig(every=2, keep=2),
        output=folder / "not" / "yet",
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "sgd", "muon", "adafactor"])
def test_the_optimizers_state_is_as_large_as_planned(tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr(adamw_8bit, "SMALLEST", 1025)  # of these matrices, some
    case = tiny_case()
    optim = config(tmp_path, optimizer).optim
    optimizers = make_optimizers(case.distiller, optim, 0.001, torch.device("cpu"))
    for parameter in case.distiller.parameters():
        parameter.grad = torch.ones_like(parameter)
    for each in optimizers:
        each.step()
    states = [s for each in optimizers for s in each.state.values()]
    held = sum(v.nbytes for s in states for v in s.values() if v.numel() > 1)
    assert state_bytes(case.distiller, optim) == held


def test_the_activations_of_twice_the_rows_are_twice_as_large_and_nothing_changes():
    case = tiny_case()
    before = weights_of(case.distiller)
    one = run_micro_batch(case, case.data.batch([0]))
    two = run_micro_batch(case, case.data.batch([0, 0]))
    weight_gradient = 96 * 32 * 4  # of the head, kept from the forward pass whatever the rows
    once = one.saved_bytes - weight_gradient
    assert two.saved_bytes - weight_gradient == pytest.approx(2 * once, rel=0.05)
    assert two.tokens == 2 * one.tokens
    assert all(map(torch.equal, before, weights_of(case.distiller)))
    assert not any(p.grad is not None for p in case.distiller.parameters())


def test_a_copy_of_the_weights_in_bfloat16_is_planned(tmp_path):
    plans = []
    for dtype in (None, torch.bfloat16):
        case = tiny_case()
        case.student.compute_dtype = dtype
        plans.append(
            make_plan(case, config(tmp_path), micro_batch=1, students=1, free_memory_bytes=1 << 30)
        )
    weights = sum(p.nbytes for p in case.distiller.parameters())
    name = "weights in parallel.compute_dtype"
    assert [plan.memory_bytes.get(name) for plan in plans] == [None, weights / 2]


def test_activation_checkpointing_keeps_less(tmp_path):
    kept = run_micro_batch(tiny_case(), tiny_case().data.batch([0, 1])).saved_bytes
    for how in ("selective", "full"):
        student = tiny_model("llama", 2, seed=2)
        checkpoint_activations(student, how)
        case = tiny_case(student=student)
        less = run_micro_batch(case, case.data.batch([0, 1])).saved_bytes
        hidden = checkpointed_bytes(student, config(tmp_path, activation_checkpointing=how), 2)
        assert less + hidden < kept
        kept = less + hidden
    assert hidden == 2 * 40 * 2 * 32 * 4, "the inputs of two blocks"
    assert checkpointed_bytes(student, config(tmp_path), 2) == 0


def test_a_plan_counts_passes_students_and_checkpoints(tmp_path):
    case = tiny_case()
    plan = make_plan(case, config(tmp_path), micro_batch=2, students=3, free_memory_bytes=1 << 40)
    assert (plan.micro_batch, plan.micro_batches_per_step) == (2, 3)
    weights = 4 * sum(p.numel() for p in case.distiller.parameters())
    assert plan.memory_bytes["gradients"] == weights
    assert plan.disk.checkpoint_bytes == 3 * weights
    # two newest, the best, and one being written, of each of three students; and four students
    assert plan.disk.needed_bytes == 3 * 4 * 3 * weights + 4 * weights
    assert plan.seconds > 0
    assert plan.passes_over_text == pytest.approx(5 * 10 / 6)
    assert not (tmp_path / "not").exists()
    assert all(proof.holds for proof in plan_findings(plan))


def test_too_small_a_disk_fails_and_too_small_a_memory_warns(tmp_path):
    plan = make_plan(tiny_case(), config(tmp_path), micro_batch=1, students=1, free_memory_bytes=0)
    disk, memory = plan_findings(plan)
    assert disk.holds
    assert not memory.holds
    assert not memory.fails
    full = dataclasses.replace(plan, disk=dataclasses.replace(plan.disk, free_bytes=10))
    disk, _ = plan_findings(full)
    assert disk.name == "disk"
    assert disk.fails


def test_a_micro_batch_that_does_not_fit_names_the_options_to_change(monkeypatch):
    case = tiny_case()

    def full(self, batch, signal, step_tokens):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(case.distiller), "forward", full)
    with pytest.raises(ConfigError, match="activation_checkpointing=full"):
        run_micro_batch(case, case.data.batch([0]))
    assert not any(p.grad is not None for p in case.distiller.parameters())
