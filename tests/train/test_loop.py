"""A whole run on toy models: what it writes, what it keeps, when it stops."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from limbeck.config import MemoryConfig, ObjectiveConfig
from limbeck.data.order import permutation
from limbeck.distributed import StopSignals, latest
from limbeck.errors import ConfigError, DataError, NonFiniteError, RunError
from limbeck.train import train, train_step
from limbeck.train.optimizers import set_rate
from limbeck.train.schedule import make_schedule
from tests.train.toy import (
    ALONE,
    LENGTH,
    FakeTeacher,
    Listener,
    ToyBatches,
    fingerprint,
    tensors,
    toy_pair,
    toy_setup,
)


def rows_of(step):
    """The rows of a step, by the definition of their order."""
    places = range(3 * step, 3 * step + 3)
    return [int(permutation(11, place // 10, 10)[place % 10]) for place in places]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_saved(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def test_a_run_takes_the_same_steps_as_a_plain_loop(tmp_path):
    """The loop against its definition: order, schedule, AdamW, nothing else."""
    setup = toy_setup(tmp_path)
    result = train(setup)
    distiller, teacher = toy_pair()
    matrices = [p for p in distiller.parameters() if p.ndim >= 2]
    rest = [p for p in distiller.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rate = make_schedule(setup.optim, 0.01)
    losses = []
    for step in range(24):
        rows = rows_of(step)
        set_rate([optimizer], rate(step))
        batch = [ToyBatches().batch(rows)]
        outcome = train_step(distiller, teacher, [optimizer], batch, ALONE, max_grad_norm=1.0)
        losses.append(outcome.loss)
    assert result.step == result.best_step == 24
    said = [r["loss"] for r in records(tmp_path) if r["kind"] == "step"]
    assert said == pytest.approx(losses, rel=1e-4)
    for name, value in distiller.state_dict().items():
        torch.testing.assert_close(setup.distiller.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    assert losses[-1] < losses[0]


def test_a_run_logs_every_step_once_with_growing_totals(tmp_path):
    heard = []
    train(toy_setup(tmp_path, sinks=[Listener(heard.append)]))
    said = records(tmp_path)
    assert [r["step"] for r in said] == list(range(1, 25))
    keys = {"kind", "step", "loss", "divergence", "cross_entropy", "hidden_state"}
    keys |= {"learning_rate", "grad_norm", "tokens", "seconds", "tokens_per_second"}
    keys |= {"memory_bytes"}
    assert said[0].keys() == keys
    assert [r["tokens"] for r in said] == sorted({r["tokens"] for r in said})
    assert heard[1:] == said


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    values = iter([5.0, 3.0, 4.0, 4.5, math.nan, 3.0])
    setup = toy_setup(tmp_path, evaluate=lambda: {"forward_kl": next(values)}, evaluate_every=4)
    result = train(setup)
    assert result.best_step == 8
    assert steps_saved(tmp_path) == [8, 20, 24]
    measured = [r["forward_kl"] for r in records(tmp_path) if r["kind"] == "evaluation"]
    assert measured == [5.0, 3.0, 4.0, 4.5, None, 3.0]


def test_a_new_best_is_saved_though_no_checkpoint_is_due(tmp_path):
    values = iter([5.0, 3.0, 4.0])
    train(
        toy_setup(
            tmp_path,
            checkpoint={"every": 100, "keep": 1},
            evaluate=lambda: {"cross_entropy": next(values), "forward_kl": 1.0},
            selected_by="cross_entropy",
            evaluate_every=10,
        )
    )
    assert steps_saved(tmp_path) == [20, 24]


def evaluations(*values):
    """A measurement that gives these values in turn."""
    left = iter(values)
    return lambda: {"forward_kl": next(left)}


def test_training_ends_after_evaluations_without_a_better_value(tmp_path):
    measured = (5.0, 3.0, 4.0, 2.0, 2.5, math.nan)
    setup = toy_setup(
        tmp_path, evaluate=evaluations(*measured), evaluate_every=2, patience=2, optim={"steps": 99}
    )
    result = train(setup)
    assert (result.step, result.best_step) == (12, 8)
    assert steps_saved(tmp_path)[-1] == 12
    assert records(tmp_path)[-1]["text"] == "training ends: forward_kl was lowest at step 8"


def test_a_resumed_run_counts_evaluations_from_before_and_stays_ended(tmp_path):
    whole = {"evaluate_every": 2, "patience": 3, "optim": {"steps": 99}}
    measured = (5.0, 3.0, 4.0, 3.5, 6.0)
    stop_after(tmp_path, 7, evaluate=evaluations(*measured[:3]), **whole)
    result = train(toy_setup(tmp_path, resume=True, evaluate=evaluations(*measured[3:]), **whole))
    assert (result.step, result.best_step) == (10, 4)
    assert train(toy_setup(tmp_path, resume=True, **whole)) == result


def test_a_best_checkpoint_that_is_gone_is_chosen_anew_after_resuming(tmp_path):
    """Step 12 was better than step 4, whose checkpoint it replaced; step 8 is resumed from."""
    options = {"evaluate_every": 4, "patience": 3, "checkpoint": {"keep": 3}}
    stop_after(tmp_path, 13, evaluate=evaluations(3.0, 5.0, 2.0), **options)
    for step in (12, 13):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:06d}")
    assert steps_saved(tmp_path) == [8]
    setup = toy_setup(tmp_path, resume=True, evaluate=evaluations(4.0, 6.0, 7.0, 8.0), **options)
    result = train(setup)
    assert (result.step, result.best_step) == (24, 12)
    assert 12 in steps_saved(tmp_path)


def test_evaluation_runs_in_eval_mode_and_training_in_train_mode(tmp_path):
    setup = toy_setup(tmp_path, evaluate_every=12)
    modes = []
    setup = replace(
        setup,
        evaluate=lambda: modes.append(setup.distiller.student.training) or {"forward_kl": 1.0},
    )
    train(setup)
    assert modes == [False, False]
    assert setup.distiller.student.training


def test_a_run_without_a_teacher_learns_from_the_data(tmp_path):
    from limbeck.config import ObjectiveConfig

    distiller, _ = toy_pair(ObjectiveConfig(alpha=0.0))
    train(toy_setup(tmp_path, pair=(distiller, None)))
    said = records(tmp_path)
    assert "divergence" not in said[0]
    assert said[-1]["cross_entropy"] < said[0]["cross_entropy"]


def poison(distiller, steps):
    """Make the gradient of some steps, counted from 1, not a number."""
    calls = []

    def hook(gradient):
        calls.append(0)
        return gradient * math.nan if (len(calls) + 1) // 2 in steps else gradient

    distiller.student.blocks[0].mlp.up_proj.weight.register_hook(hook)


def test_a_bad_step_is_named_dumped_and_not_taken(tmp_path):
    setup = toy_setup(tmp_path, optim={"max_bad_steps": 3})
    poison(setup.distiller, {5, 6})
    train(setup)
    said = records(tmp_path)
    bad = [r for r in said if r["kind"] == "non_finite"]
    rows = rows_of(4)
    assert [r["step"] for r in bad] == [5, 6]
    assert bad[0]["rows"] == sorted(rows)
    assert bad[0]["documents"] == [f"toy.jsonl:{row + 1}" for row in sorted(rows)]
    assert bad[0].keys() == {"kind", "step", "rows", "documents"}
    assert [r["step"] for r in said if r["kind"] == "step"] == [*range(1, 5), *range(7, 25)]
    dumped = json.loads((tmp_path / "non_finite-000005.json").read_text())
    assert dumped["input_ids"] == ToyBatches().batch(sorted(rows)).input_ids.tolist()


class PoisonedTeacher(FakeTeacher):
    """Says NaN of one row."""

    def __init__(self, teacher, row_tokens) -> None:
        super().__init__(teacher)
        self._row_tokens = row_tokens

    def signal(self, batch):
        said = self._teacher.signal(batch)
        bad = (batch.input_ids == self._row_tokens).all(1)
        here = bad[:, None].expand_as(batch.scored)[batch.scored]
        layers = {
            layer: hidden.masked_fill(here[:, None], math.nan)
            for layer, hidden in said.layer_hidden.items()
        }
        return replace(said, layer_hidden=layers)


def test_the_row_with_a_non_finite_loss_is_named(tmp_path):
    distiller, teacher = toy_pair()
    bad_row = 6
    poisoned = PoisonedTeacher(teacher, ToyBatches().batch([bad_row]).input_ids)
    train(toy_setup(tmp_path, pair=(distiller, poisoned)))
    bad = [r for r in records(tmp_path) if r["kind"] == "non_finite"]
    assert len(bad) >= 6
    assert {tuple(r["rows"]) for r in bad} == {(bad_row,)}
    assert all(p.isfinite().all() for p in distiller.parameters())


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    setup = toy_setup(tmp_path, optim={"max_bad_steps": 2})
    poison(setup.distiller, {3, 7, 8, 9})
    with pytest.raises(NonFiniteError, match=r"2 steps in a row up to step 8.*learning_rate"):
        train(setup)
    assert records(tmp_path)[-1]["step"] == 8


@pytest.mark.parametrize("stop_at", [3, 8, 14])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stop_at):
    train(toy_setup(tmp_path / "whole"))
    folder = tmp_path / "stopped"
    stop_after(folder, stop_at)
    train(toy_setup(folder, resume=True))
    assert fingerprint(folder) == fingerprint(tmp_path / "whole")
    whole, resumed = records(tmp_path / "whole"), records(folder)
    steps = [r for r in resumed if r["kind"] == "step"]
    assert [r["loss"] for r in steps] == [r["loss"] for r in whole]
    assert [r["tokens"] for r in steps] == [r["tokens"] for r in whole]
    assert steps[-1]["seconds"] > steps[stop_at - 1]["seconds"]
    assert f"resumed at {stop_at}" in [r.get("text") for r in resumed]


def stop_after(folder, step, **changes):
    """Run until a SIGTERM that comes during a step; the run saves once and says so."""
    import os
    import signal

    from limbeck.errors import Stopped

    def hear(record):
        if record["step"] == step and record["kind"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as stop, pytest.raises(Stopped, match=f"saved at step {step}") as told:
        train(toy_setup(folder, stop=stop, sinks=[Listener(hear)], **changes))
    assert told.value.exit_code == 143
    newest = latest(folder / "checkpoints")
    assert newest is not None
    assert int(newest.name[5:]) == step


def test_a_finished_run_resumes_to_its_own_result(tmp_path):
    result = train(toy_setup(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    again = train(toy_setup(tmp_path, resume=True))
    assert again == result
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


def test_a_directory_with_a_run_is_not_overwritten(tmp_path):
    train(toy_setup(tmp_path, optim={"steps": 4}))
    with pytest.raises(ConfigError, match=r"already holds a run, saved at step-000004. Resume it"):
        train(toy_setup(tmp_path, optim={"steps": 4}))


def test_another_recipe_or_other_data_is_refused_with_the_difference(tmp_path):
    train(toy_setup(tmp_path, optim={"steps": 4}))
    other = {"optim": {"steps": 30}, "objective": {"alpha": 0.5}}
    with pytest.raises(ConfigError) as told:
        train(toy_setup(tmp_path, resume=True, fingerprint=other))
    assert "optim.steps: was 24, is 30" in str(told.value)
    assert "objective.alpha: was 'absent', is 0.5" in str(told.value)
    with pytest.raises(ConfigError, match="sample_order: was"):
        train(toy_setup(tmp_path, resume=True, batches=ToyBatches(11)))


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least one row"):
        train(toy_setup(tmp_path, batches=ToyBatches(0)))


def test_running_out_of_memory_names_the_options_to_change(tmp_path):
    class Greedy(FakeTeacher):
        def signal(self, batch):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")

    distiller, teacher = toy_pair()
    with pytest.raises(RunError, match=r"2 rows of 12 .*memory.micro_batch.*head_budget_mb"):
        train(toy_setup(tmp_path, pair=(distiller, Greedy(teacher))))


def test_an_automatic_micro_batch_is_kept_when_resuming(tmp_path):
    memory = MemoryConfig(micro_batch="auto")
    train(toy_setup(tmp_path, memory=memory, optim={"steps": 4}))
    newest = latest(tmp_path / "checkpoints")
    saved = json.loads((newest / "state.json").read_text())
    assert saved["facts"]["totals"]["micro_batch"] == 3
    assert tensors(newest)
    assert saved["facts"]["totals"]["tokens"] <= 4 * 3 * LENGTH


def test_a_weight_that_follows_a_schedule_is_that_of_its_step(tmp_path):
    moving = TypeAdapter(ObjectiveConfig).validate_python(
        {"alpha": {"type": "linear", "from": 1.0, "to": 0.0, "steps": 4}}
    )
    heard = []
    train(
        toy_setup(
            tmp_path,
            pair=toy_pair(moving),
            optim={"steps": 6},
            sinks=[Listener(heard.append)],
        )
    )
    steps = [r for r in heard if r["kind"] == "step"]
    for record, alpha in zip(steps, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0], strict=True):
        mixed = alpha * record["divergence"] + (1 - alpha) * record["cross_entropy"]
        assert record["loss"] == pytest.approx(mixed, rel=1e-5)
