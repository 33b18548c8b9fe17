"""A run that is killed goes on from its last checkpoint, and ends with the same bits."""

import json
import os
import random
import signal
import threading
import time

import pytest

from limbeck.distributed import StopSignals, World, latest, load_checkpoint, shard
from limbeck.distributed.checkpoints import step_of
from limbeck.errors import Stopped
from limbeck.train import train
from tests.distributed.processes import live, ranks
from tests.train.toy import ALONE, FakeTeacher, Listener, fingerprint, toy_pair, toy_setup


def life(folder, kill_at):
    """One life of a run; it kills itself right after a step is said, before it is saved."""

    def hear(record):
        if record["kind"] == "step" and record["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    train(toy_setup(folder, resume=True, sinks=[Listener(hear)]))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_killed_in_three_epochs_ends_with_the_same_bits(tmp_path):
    """Ten rows and three a step: steps 7, 14 and 20 are in the third, fifth and sixth epoch."""
    assert live(life, tmp_path / "whole", 0) == 0
    folder = tmp_path / "killed"
    for kill_at in (7, 14, 20):
        assert live(life, folder, kill_at) == -signal.SIGKILL
        saved = latest(folder / "checkpoints")
        assert saved is not None
        assert kill_at - 4 <= step_of(saved) < kill_at, "at most one interval is lost"
    assert live(life, folder, 0) == 0
    assert fingerprint(folder) == fingerprint(tmp_path / "whole")
    said = records(folder)
    resumed = [r["step"] for r in said if r["kind"] == "note"]
    assert resumed == [4, 12, 16]
    steps = [r for r in said if r["kind"] == "step"]
    whole = [r for r in records(tmp_path / "whole") if r["kind"] == "step"]
    for key in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [r[key] for r in steps] == [r[key] for r in whole], key
    assert [r["seconds"] for r in steps] == sorted(r["seconds"] for r in steps)


def hunted_life(folder, delay_s):
    """A life that ends at any moment: within a step, within a save, between the two."""

    def kill():
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    def hear(record):
        if record["kind"] == "begin":
            threading.Thread(target=kill, daemon=True).start()

    train(toy_setup(folder, resume=True, checkpoint={"every": 1}, sinks=[Listener(hear)]))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    assert live(life, tmp_path / "whole", 0) == 0
    folder = tmp_path / "killed"
    chance = random.Random(0)
    kills = 0
    for _ in range(12):
        code = live(hunted_life, folder, chance.uniform(0.01, 0.08))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        kills += 1
    assert kills >= 3
    assert live(life, folder, 0) == 0
    assert fingerprint(folder) == fingerprint(tmp_path / "whole")
    steps = [r["step"] for r in records(folder) if r["kind"] == "step"]
    assert steps == list(range(1, 25))
    left = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".tmp")]
    assert left == []


def sharded_life(world: World, folder, signalled_rank, signal_at):
    """A life on several ranks, of which one gets a SIGTERM."""
    distiller, teacher = toy_pair()
    shard(distiller, distiller.student.blocks, world)
    shard(teacher.model, teacher.model.blocks, world)

    class Told(FakeTeacher):
        calls = 0

        def signal(self, batch):
            self.calls += 1
            if world.rank == signalled_rank and self.calls == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return teacher.signal(batch)

    with StopSignals() as stop:
        setup = toy_setup(
            folder, pair=(distiller, Told(teacher)), world=world, resume=True, stop=stop
        )
        if signal_at:
            with pytest.raises(Stopped) as told:
                train(setup)
            assert told.value.exit_code == 143
            assert latest(setup.checkpoints, world) is not None
        else:
            train(setup)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_both_resume_to_the_same_bits(tmp_path):
    assert ranks(2, sharded_life, tmp_path / "whole", 0, 0) == [0, 0]
    folder = tmp_path / "stopped"
    for rank, at in ((1, 5), (0, 6)):
        assert ranks(2, sharded_life, folder, rank, at) == [0, 0]
    assert ranks(2, sharded_life, folder, 0, 0) == [0, 0]
    notes = [r["step"] for r in records(folder) if r["kind"] == "note"]
    assert len(notes) == 2
    assert notes[1] > notes[0] > 0
    ends = []
    for place in (tmp_path / "whole", folder):
        distiller, _ = toy_pair()
        newest = latest(place / "checkpoints")
        assert newest is not None
        load_checkpoint(newest, distiller, [], ALONE)
        ends.append({name: value.tolist() for name, value in distiller.state_dict().items()})
    assert ends[0] == ends[1]
    whole = [r["loss"] for r in records(tmp_path / "whole") if r["kind"] == "step"]
    assert [r["loss"] for r in records(folder) if r["kind"] == "step"] == whole


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)],
)
def test_every_signal_saves_once_and_exits_with_its_code(number, code, tmp_path):
    def hear(record):
        if record["kind"] == "step" and record["step"] == 5:
            os.kill(os.getpid(), number)

    with StopSignals() as stop, pytest.raises(Stopped, match="saved at step 5") as told:
        train(toy_setup(tmp_path, stop=stop, sinks=[Listener(hear)]))
    assert told.value.exit_code == code
    assert [step_of(p) for p in sorted((tmp_path / "checkpoints").iterdir())] == [4, 5]


def test_a_signal_before_the_first_step_stops_without_a_checkpoint(tmp_path):
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="at step 0, with nothing to save"):
            train(toy_setup(tmp_path, stop=stop))
    assert latest(tmp_path / "checkpoints") is None


def test_a_second_interrupt_ends_the_process_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(Stopped, match="second Ctrl-C") as ending:
            signal.raise_signal(signal.SIGINT)
    assert ending.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
