"""What rank 0 does alone: its errors are those of all ranks, and what it finds is what all find."""

import pytest
import torch

from limbeck.errors import StorageError
from limbeck.experiment import assemble, load, run, trials
from limbeck.experiment.parts import Parts
from limbeck.train.metrics import JsonlSink
from tests.distributed.processes import launched
from tests.experiment.tiny_run import write_recipe

WRITES = (
    (run, "make_sinks"),
    (trials, "write_scores"),
    (JsonlSink, "begin"),
    (Parts, "publish_student"),
    (run, "write_report"),
)
"""In the order in which a run comes to them."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def full(*_, **__):
    raise StorageError("the disk is full")


def fail_at_each_write(folder):
    torch.set_num_threads(1)
    with assemble(load(folder / "recipe.yaml")) as made, pytest.MonkeyPatch.context() as patch:
        if not made.is_main:  # a shared disk may still show it what was there before
            patch.setattr(run, "require_directory", full)
        for owner, name in WRITES:
            plain = getattr(owner, name)
            patch.setattr(owner, name, full)
            with pytest.raises(StorageError, match="the disk is full"):
                made.train(resume=True)
            patch.setattr(owner, name, plain)
        assert (made.train(resume=True).report is None) == (not made.is_main)


def test_a_disk_that_is_full_at_any_write_of_rank_0_ends_every_rank_with_its_error(tmp_path):
    write_recipe(tmp_path, evaluate={"baseline": None}, parallel={"timeout_s": 40})
    assert launched(2, fail_at_each_write, tmp_path) == [0, 0]
    assert (tmp_path / "run" / "report.html").exists()
