"""Ranks write the text of one process together, however unevenly their rollouts end."""

import json

import pytest
import torch

from limbeck.config import ObjectiveConfig
from limbeck.data.source import ShuffledRows
from limbeck.distributed import shard
from limbeck.rollouts import Mixed, Rollouts, Sampling
from limbeck.train import train
from tests.distributed.processes import on_ranks
from tests.train.toy import ALONE, LENGTH, ToyBatches, toy_pair, toy_setup

PROMPTS = [[5], [3, 9, 1, 7], [2, 2], [30, 11, 4], [8, 1, 6, 6, 20]]
ENDS = [4, 9, 17, 21, 30, 33]
NAMES = ("loss", "grad_norm", "tokens", "rollout_length", "rollout_ended", "rollout_entropy")
NAMES += ("rollout_staleness",)


def run(world, folder, mixed, refresh, rows):
    """Four steps; of three rollouts two ranks have one and two, which end after 1 to 6 tokens."""
    torch.set_num_threads(1)
    distiller, teacher = toy_pair(ObjectiveConfig(alpha=1.0, divergence="reverse_kl"))
    distiller.student.hf_model.generation_config.eos_token_id = ENDS
    shard(distiller, distiller.student.blocks, world)
    shard(teacher.model, teacher.model.blocks, world)
    source = Rollouts(
        distiller.student,
        PROMPTS,
        Sampling(tokens=6),
        seed=11,
        rows_per_step=rows,
        refresh=refresh,
        num_steps=4,
        folder=folder / "rollouts",
        root=distiller,
        first_number=10,
    )
    if mixed:
        source = Mixed(source, ShuffledRows(ToyBatches(), seed=3, rows_per_step=1))
    optim = {"steps": 4, "tokens_per_step": (rows + mixed) * LENGTH, "type": "sgd"}
    setup = toy_setup(folder, pair=(distiller, teacher), optim=optim, source=source, world=world)
    train(setup)


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: r[name] for name in NAMES} for r in lines if r["kind"] == "step"]


def texts(folder):
    files = sorted((folder / "rollouts").iterdir())
    return [[json.loads(line)["token_ids"] for line in f.read_text().splitlines()] for f in files]


@pytest.mark.parametrize(
    ("spread", "mixed", "refresh", "rows"),
    [("auto", True, 3, 3), ("none", False, 1, 3), ("auto", False, 1, 1)],
)
def test_two_ranks_write_and_train_like_one_process(spread, mixed, refresh, rows, tmp_path):
    """With one row a step, one of the ranks writes nothing and has no pass of its own."""
    run(ALONE, tmp_path / "one", mixed, refresh, rows)
    on_ranks(2, run, tmp_path / "two", mixed, refresh, rows, spread=spread)
    assert texts(tmp_path / "two") == texts(tmp_path / "one")
    assert len({len(row) for step in texts(tmp_path / "one") for row in step}) > min(rows, 2)
    for found, expected in zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
