"""Checkpoints that are written while training goes on: whole or not there, as any other."""

import json
import os
import random
import resource
import signal
import threading
import time

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from limbeck.config import MemoryConfig
from limbeck.distributed import StopSignals, begin_saving, latest, load_checkpoint
from limbeck.distributed.checkpoints import step_of
from limbeck.distributed.saving import HeldWriter
from limbeck.errors import Stopped, StorageError
from limbeck.files import damage
from limbeck.train import train
from tests.distributed.processes import join, launch, live, on_ranks, renew_threads, served_store
from tests.distributed.test_checkpoints import save, start, steps
from tests.train.toy import ALONE, Listener, fingerprint, tensors, toy_pair, toy_setup

BACKGROUND = {"asynchronous": True}
AUTOMATIC = MemoryConfig(micro_batch="auto")
plain_write = HeldWriter.write


def written_after(seconds):
    """Writing that begins later, as on a slow disk."""

    def write(writer):
        time.sleep(seconds)
        return plain_write(writer)

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_later_is_what_was_there_when_it_began(tmp_path, monkeypatch):
    parts = start()
    steps(ALONE, parts, [0])
    whole = save(tmp_path / "at once", 1, parts)
    free = threading.Event()
    monkeypatch.setattr(HeldWriter, "write", lambda each: free.wait(60) and plain_write(each))
    folder = tmp_path / "later"
    saving = begin_saving(folder, 1, parts[0], parts[2], {"tokens": 12}, ALONE, in_background=True)
    steps(ALONE, parts, [1, 2])
    torch.rand(3)
    assert not saving.is_written
    assert latest(folder) is None
    free.set()
    assert saving.finish() == folder / "step-000001"
    mine, theirs = tensors(folder / "step-000001"), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    texts = [(place / "state.json").read_text() for place in (whole, folder / "step-000001")]
    assert texts[0] == texts[1]


def test_writing_does_not_touch_cuda(tmp_path, monkeypatch):
    """In a thread of its own the current card is 0, where every rank would make a context."""

    def refuse(*_, **__):
        raise AssertionError("what is written is on the CPU")

    folder, parts = tmp_path / "checkpoints", start()
    steps(ALONE, parts, [0])  # an optimizer without state would take a step when it is saved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", refuse)
    begin_saving(folder, 1, parts[0], parts[2], {}, ALONE, in_background=True).finish()
    assert latest(folder) == folder / "step-000001"


def slow_rank(here, folder):
    parts = start(here)
    steps(here, parts, [0, 1])
    flag = folder / "go on"
    if here.rank == 1:

        def write(writer):
            while not flag.exists():
                time.sleep(0.01)
            return plain_write(writer)

        HeldWriter.write = write
    saving = begin_saving(folder / "c", 2, parts[0], parts[2], {}, here, in_background=True)
    losses = steps(here, parts, [2])
    if here.is_main:
        saving._written.result()
        assert saving.is_written
        assert latest(folder / "c") is None, "rank 1 has not written"
        flag.touch()
    final = saving.finish()
    again = start(here)
    load_checkpoint(final, again[0], again[2], here)
    assert steps(here, again, [2]) == losses
    if here.is_main:
        files = json.loads((final / "manifest.json").read_text().split("\n")[0])["files"]
        assert len([name for name in files if name.endswith(".safetensors")]) == 2


def test_nothing_is_published_before_every_rank_has_written(tmp_path):
    on_ranks(2, slow_rank, tmp_path)


def full_run(folder, **settings):
    checkpoint = {**BACKGROUND, **settings.pop("checkpoint", {})}
    return train(toy_setup(folder, resume=True, checkpoint=checkpoint, **settings))


def test_a_run_saved_in_the_background_is_the_same_run(tmp_path, monkeypatch):
    train(toy_setup(tmp_path / "at once"))
    monkeypatch.setattr(HeldWriter, "write", written_after(0.05))
    full_run(tmp_path / "later")
    assert fingerprint(tmp_path / "later") == fingerprint(tmp_path / "at once")
    for place in ("later", "at once"):
        assert names(tmp_path / place / "checkpoints") == ["step-000020", "step-000024"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_run_that_is_asked_to_stop_publishes_what_is_being_written(
    number, code, tmp_path, monkeypatch
):
    free = threading.Event()
    monkeypatch.setattr(HeldWriter, "write", lambda each: free.wait(60) and plain_write(each))

    def hear(record):
        if record["kind"] == "step" and record["step"] == 5:
            assert latest(tmp_path / "checkpoints") is None, "step 4 is being written"
            os.kill(os.getpid(), number)
            free.set()

    with StopSignals() as stop, pytest.raises(Stopped, match="saved at step 5") as told:
        full_run(tmp_path, stop=stop, sinks=[Listener(hear)])
    assert told.value.exit_code == code
    assert names(tmp_path / "checkpoints") == ["step-000004", "step-000005"]
    assert all(damage(path) is None for path in (tmp_path / "checkpoints").iterdir())


def on_a_full_disk(here, folder):
    """Files of the last rank may not grow beyond some bytes from step 8 on, as on a full disk."""
    said = []

    def hear(record):
        said.append(record)

    class Full:
        calls = 0

    pair = start(here)[:2]
    plain = HeldWriter.write

    def write(writer):
        Full.calls += 1
        if Full.calls == 2 and here.rank == here.size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return plain(writer)

    HeldWriter.write = write
    setup = toy_setup(folder, pair=pair, world=here, checkpoint=BACKGROUND, sinks=[Listener(hear)])
    with pytest.raises(StorageError) as told:
        train(setup)
    assert told.value.exit_code == 6
    if here.size > 1 and here.is_main:
        assert max(each["step"] for each in said if each["kind"] == "step") >= 8
        assert names(folder / "checkpoints") == ["step-000004"]


def alone_on_a_full_disk(folder):
    on_a_full_disk(ALONE, folder)


def test_a_disk_that_is_full_in_the_background_ends_the_run_and_spares_what_was_there(tmp_path):
    assert live(alone_on_a_full_disk, tmp_path / "one") == 0
    on_ranks(2, on_a_full_disk, tmp_path / "two")
    for place in ("one", "two"):
        assert names(tmp_path / place / "checkpoints") == ["step-000004"]
        assert latest(tmp_path / place / "checkpoints") is not None


def saving_life(here, folder, writes, asynchronous):
    """A rank of a run that saves after each step; writes a byte when its first save begins."""
    plain = HeldWriter.write_data

    def write_data(writer, plan, planner):
        os.write(writes, b".")
        return plain(writer, plan, planner)

    HeldWriter.write_data = write_data
    checkpoint = {"every": 1, "asynchronous": asynchronous}
    pair = start(here)[:2]
    optim = {"steps": 10_000}
    train(toy_setup(folder, pair=pair, world=here, resume=True, checkpoint=checkpoint, optim=optim))


def forked_rank(rank, size, port, *arguments):
    """Fork a rank of a saving life; its process id."""
    child = os.fork()
    if child:
        return child
    renew_threads()
    try:
        if size == 1:
            saving_life(ALONE, *arguments)
        launch(rank, size, port, join, "auto", 1, saving_life, *arguments)
    finally:
        os._exit(1)


def killed_life(folder, size, chance, asynchronous):
    """Kill the forked ranks of a life one after another, some time after its first save began."""
    reads, writes = os.pipe()
    store = served_store()
    children = [forked_rank(r, size, store.port, folder, writes, asynchronous) for r in range(size)]
    os.close(writes)
    assert os.read(reads, 1) == b".", "it could not resume"
    os.close(reads)
    time.sleep(chance.uniform(0, 0.05 * size))
    chance.shuffle(children)
    for number, child in enumerate(children):
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL or number, "it ended by itself"
        time.sleep(chance.uniform(0, 0.01))


def hunt(folder, kills, seed, size=1):
    """Kill lives of one run, each of which resumes from what the one before left.

    Call it in a process that has no threads. Writes to hunt.json how many kills left a half-written
    checkpoint behind, and the step of the newest whole one.
    """
    chance, newest, halves, checkpoints = random.Random(seed), -1, 0, folder / "checkpoints"
    for kill in range(5 * kills):
        if kill >= kills and newest >= 0 and halves:
            break  # the first lives may all end before anything is published, or while nothing is
        killed_life(folder, size, chance, asynchronous=kill % 2 == 1)
        halves += any(checkpoints.glob(".tmp-*"))
        published = list(checkpoints.glob("step-*"))
        assert [path.name for path in published if damage(path) is not None] == []
        step = max(map(step_of, published), default=-1)
        assert step >= newest, "what was published stays"
        newest = step
    (folder / "hunt.json").write_text(json.dumps({"halves": halves, "newest": newest}))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kills"), [(1, 20), (2, 6)])
def test_a_run_killed_while_it_saves_leaves_only_whole_checkpoints(tmp_path, size, kills):
    assert live(hunt, tmp_path, kills, os.getpid(), size) == 0
    assert json.loads((tmp_path / "hunt.json").read_text())["halves"] > 0
    distiller, _ = toy_pair()
    newest = latest(tmp_path / "checkpoints")
    assert load_checkpoint(newest, distiller, [], ALONE)["totals"]["step"] == step_of(newest)


def saved_totals(folder):
    state = json.loads((latest(folder / "checkpoints") / "state.json").read_text())
    return state["facts"]["totals"]


def train_four_steps(world, folder):
    train(toy_setup(folder, world=world, memory=AUTOMATIC, optim={"steps": 4}))


def test_a_micro_batch_chosen_for_two_ranks_is_chosen_again_for_one(tmp_path):
    """Of 3 rows in a step one rank has 2 and a single process 3."""
    on_ranks(2, train_four_steps, tmp_path)
    assert saved_totals(tmp_path)["micro_batch"] == 2
    train(toy_setup(tmp_path, memory=AUTOMATIC, optim={"steps": 8}, resume=True))
    assert saved_totals(tmp_path)["micro_batch"] == 3
