"""Each optimizer is torch's own, decays matrices only, and survives a checkpoint."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.optim import SGD, Adafactor, AdamW, Muon

from limbeck.config import OptimConfig
from limbeck.distributed import adamw_8bit, load_checkpoint
from limbeck.train.optimizers import make_optimizers, set_rate
from tests.distributed.saved_checkpoint import save_checkpoint
from tests.train.toy import ALONE, toy_pair

CPU = torch.device("cpu")
KINDS = ["adamw", "sgd", "muon", "adafactor"]
ALL_KINDS = [*KINDS, "adamw_8bit"]


def config(kind: str) -> OptimConfig:
    return OptimConfig(type=kind, learning_rate=0.01, steps=1, weight_decay=0.1, momentum=0.8)


def reference(kind: str, distiller):
    named = dict(distiller.named_parameters())
    block_matrices = [p for n, p in named.items() if ".layers." in n and p.ndim == 2]
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return [AdamW(groups, lr=0.01, betas=(0.9, 0.95))]
    if kind == "sgd":
        return [SGD(groups, lr=0.01, momentum=0.8)]
    if kind == "adafactor":
        return [Adafactor(groups, lr=0.01)]
    own = {id(p) for p in block_matrices}
    others = [
        {**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups
    ]
    muon = Muon(
        block_matrices, lr=0.01, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, AdamW(others, lr=0.01, betas=(0.9, 0.95))]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_eps_and_betas_reach_adamw(kind):
    distiller, _ = toy_pair()
    optim = replace(config(kind), eps=0.1, betas=(0.8, 0.99))
    adamw = make_optimizers(distiller, optim, 0.01, CPU)[-1]
    assert {(group["eps"], group["betas"]) for group in adamw.param_groups} == {(0.1, (0.8, 0.99))}


def step(distiller, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in distiller.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_are_those_of_torch(kind):
    distiller, _ = toy_pair()
    expected = deepcopy(distiller)
    ours = make_optimizers(distiller, config(kind), 0.01, CPU)
    theirs = reference(kind, expected)
    for seed in range(3):
        step(distiller, ours, seed)
        step(expected, theirs, seed)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(distiller.state_dict()[name], value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_state_loaded_from_a_checkpoint_gives_the_same_next_step(kind, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(adamw_8bit, "SMALLEST", 1)
    distiller, _ = toy_pair(tied=tied)
    optimizers = make_optimizers(distiller, config(kind), 0.01, CPU)
    step(distiller, optimizers, 0)
    saved = save_checkpoint(tmp_path, 1, distiller, optimizers, {"a": 1}, ALONE)
    step(distiller, optimizers, 1)
    other, _ = toy_pair(tied=tied)
    loaded = make_optimizers(other, config(kind), 0.01, CPU)
    for dirt in (7, 8):
        step(other, loaded, dirt)
    assert load_checkpoint(saved, other, loaded, ALONE) == {"a": 1}
    step(other, loaded, 1)
    for name, value in distiller.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_every_parameter_has_the_learning_rate_of_the_step():
    distiller, _ = toy_pair()
    for kind in ALL_KINDS:
        optimizers = make_optimizers(distiller, config(kind), 0.01, CPU)
        set_rate(optimizers, 0.5)
        assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.5}
        covered = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        assert {id(p) for p in covered} == {id(p) for p in distiller.parameters()}
        assert len(covered) == len(list(distiller.parameters()))
