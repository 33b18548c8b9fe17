"""What a term remembers goes through a real checkpoint, however its steps were cut."""

import pytest
import torch

from limbeck.config import ObjectiveConfig, OptimConfig
from limbeck.distributed import load_checkpoint, shard
from limbeck.train import make_optimizers, train_step
from tests.distributed.saved_checkpoint import save_checkpoint
from tests.train.toy import ALONE, ToyBatches, toy_pair

TAID = {"type": "taid", "weight": 0.5, "steps": 1000, "rate": 0.2, "temperature": 2.0}
CONFIG = ObjectiveConfig(alpha=0.5, extra=(TAID,))
OPTIM = OptimConfig(learning_rate=0.01, steps=10)


def start():
    distiller, teacher = toy_pair(CONFIG)
    shard(distiller, distiller.student.blocks, ALONE)
    return distiller, teacher, make_optimizers(distiller, OPTIM, 0.01, ALONE.device)


def steps(parts, which, cut=10):
    """Losses of some steps, all rows in each, in micro-batches of so many."""
    distiller, teacher, optimizers = parts
    losses = []
    for step in which:
        distiller.objective.set_step(step)
        rows = list(range(10))
        batches = [ToyBatches().batch(rows[at : at + cut]) for at in range(0, 10, cut)]
        outcome = train_step(distiller, teacher, optimizers, batches, ALONE)
        distiller.objective.update(outcome.shares)
        losses.append(outcome.loss)
    return losses


def memory(parts):
    return {name: float(value) for name, value in parts[0].objective.memories.named_buffers()}


def test_a_checkpoint_restores_the_state_of_terms(tmp_path):
    parts = start()
    untouched = save_checkpoint(tmp_path, 1, parts[0], parts[2], {}, ALONE)
    steps(parts, [0, 1, 2])
    saved = save_checkpoint(tmp_path, 3, parts[0], parts[2], {}, ALONE)
    kept = memory(parts)
    assert kept["taid.t"] > 0.42
    expected = steps(parts, [3, 4])
    again = start()
    load_checkpoint(saved, again[0], again[2], ALONE)
    assert memory(again) == kept
    assert steps(again, [3, 4]) == expected
    assert memory(again) == memory(parts)
    load_checkpoint(untouched, again[0], again[2], ALONE)
    assert memory(again)["taid.previous"] == float("inf")


def test_the_state_of_a_term_does_not_depend_on_micro_batches():
    whole, cut = start(), start()
    assert steps(cut, range(4), cut=3) == pytest.approx(steps(whole, range(4)), rel=1e-4)
    for name, value in memory(whole).items():
        assert memory(cut)[name] == pytest.approx(value, rel=1e-4), name


def test_the_state_of_a_term_is_converted_with_its_objective():
    distiller, _ = toy_pair(CONFIG)
    distiller.objective.to(torch.float64)
    term = distiller.objective.logit_terms["taid"]
    term.update(1.0)
    term.update(0.5)
    assert term.share().dtype == torch.float64
    assert distiller.objective.memories["taid"].t == term.memory.t > 0.4
