"""Two processes never share a run directory, and a dead one does not hold it."""

import os
import signal
import time

import pytest

from limbeck.distributed import lock, locked
from limbeck.errors import TryLaterError
from tests.distributed.processes import context, live
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


def hold_elsewhere(folder):
    """Hold a directory as a process on another machine, until a file is there and some more."""
    lock.socket.gethostname = lambda: "another-machine"
    with locked(folder, ALONE):
        while not (folder / "go").exists():
            time.sleep(0.01)
        time.sleep(1)


def test_a_resumed_run_waits_for_the_lock_of_a_machine_that_may_have_died(tmp_path):
    process = context().Process(target=hold_elsewhere, args=(tmp_path,))
    process.start()
    while not (tmp_path / lock.OWNER).exists():
        assert process.is_alive()
        time.sleep(0.01)
    with (
        pytest.raises(TryLaterError, match=r"on another-machine .* does.* lock is on .*\.lock"),
        locked(tmp_path, ALONE),
    ):
        pass
    (tmp_path / "go").touch()
    with locked(tmp_path, ALONE, resumes=True):
        assert lock.holder(tmp_path).startswith(f"process {os.getpid()} ")
    process.join()
