"""A metric sink lives on rank 0, and its failure must end every rank."""

import pytest

from limbeck.errors import StorageError
from limbeck.train import train
from tests.distributed.processes import on_ranks
from tests.train.toy import Listener, toy_setup


def train_with_a_full_disk(world, folder, full_at):
    def hear(record):
        if record.get("step") == full_at and record["kind"] == "step":
            raise StorageError("the disk is full")

    setup = toy_setup(folder, world=world, sinks=[Listener(hear)])
    with pytest.raises(StorageError, match="the disk is full"):
        train(setup)


@pytest.mark.parametrize("full_at", [3, 24])
def test_a_sink_that_fails_ends_every_rank_with_its_error(tmp_path, full_at):
    """In the middle, and at the last step, which no other follows."""
    on_ranks(2, train_with_a_full_disk, tmp_path, full_at)
