"""Dropout is a pure function of seed, step, rank and micro-batch."""

import pytest
import torch

from limbeck.config import MemoryConfig, ObjectiveConfig
from limbeck.distributed import StopSignals
from limbeck.errors import Stopped
from limbeck.layer_map import LayerMap
from limbeck.losses import PairShapes, build_objective
from limbeck.models import Distiller
from limbeck.train import train
from tests.models.tiny import tiny_model
from tests.train.toy import VOCABULARY, fingerprint, toy_pair, toy_setup


def dropout_pair():
    """GPT-2, which drops a tenth of its hidden states as transformers makes it."""
    student = tiny_model("gpt2", 2, vocabulary=VOCABULARY)
    shapes = PairShapes(2, 4, 32, 24, LayerMap.uniform(2, 4))
    objective = build_objective(ObjectiveConfig(alpha=0.5), shapes, head_budget_mb=1)
    return Distiller(student, objective), toy_pair()[1]


def trained(folder, **changes):
    """Hash of the end of eight steps."""
    setup = {"optim": {"steps": 8}, **changes}
    train(toy_setup(folder, pair=dropout_pair(), **setup))
    return fingerprint(folder)


def test_dropout_depends_on_the_seed_and_not_on_what_ran_before(tmp_path):
    torch.manual_seed(1)
    first = trained(tmp_path / "first", dropout_seed=7)
    torch.manual_seed(2)
    assert trained(tmp_path / "again", dropout_seed=7) == first
    assert trained(tmp_path / "other", dropout_seed=8) != first


class StopAt(StopSignals):
    """Stops a run after so many steps."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def counts(self):
        self._left -= 1
        first, *rest = super().counts()
        return [first + int(self._left < 0), *rest]


def test_a_resumed_run_drops_what_an_uninterrupted_one_drops(tmp_path):
    whole = trained(tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped", stop=StopAt(3))
    torch.manual_seed(99)
    assert trained(tmp_path / "stopped", resume=True) == whole


def test_rows_alone_in_a_micro_batch_get_other_masks_than_rows_together(tmp_path):
    """Stated in the documentation of `memory.micro_batch`: masks follow the cut."""
    alone = trained(tmp_path / "alone", memory=MemoryConfig(micro_batch=1))
    assert trained(tmp_path / "together", memory=MemoryConfig(micro_batch=3)) != alone
