"""Two processes never share a run directory, and a dead one does not hold it."""

import os
import signal

import pytest

from limbeck.distributed import locked
from limbeck.errors import TryLaterError
from tests.distributed.processes import live
from tests.train.toy import ALONE


def try_to_hold(folder, asked):
    with (
        pytest.raises(TryLaterError, match=f"process {asked} on .* does. Wait"),
        locked(folder, ALONE),
    ):
        pass


def die_holding(folder):
    with locked(folder, ALONE):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_second_process_exits_at_once_and_names_the_first(tmp_path):
    with locked(tmp_path / "run", ALONE):
        assert live(try_to_hold, tmp_path / "run", os.getpid()) == 0


def test_a_lock_goes_with_its_process_however_it_ends(tmp_path):
    assert live(die_holding, tmp_path) == -signal.SIGKILL
    with locked(tmp_path, ALONE):
        pass
    with locked(tmp_path, ALONE):
        pass
    assert TryLaterError.exit_code == 75
