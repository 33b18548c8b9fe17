"""Ranks that share a sharded teacher record the store of one process."""

import json
import shutil
import signal

import pytest

from limbeck.commands.record import leave_if_asked
from limbeck.distributed import StopSignals, is_sharded
from limbeck.errors import Stopped, StorageError
from limbeck.experiment import load
from limbeck.recording import Recording
from limbeck.store import ShardWriter, read_header
from tests.distributed.processes import launched
from tests.experiment.recordings import contents, record, recorded

TOP_K = {"type": "top_k", "k": 8, "temperatures": [2.0, 1.0]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def as_a_rank(path, changes, cache, figures):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", cache)
        with Recording(load(path, changes)) as recording:
            budget = recording.budget()
            done = recording.record((0, 1), budget, lambda: None)
            assert done.left == 0
            assert done.recorded == done.shards
            model = recording.teacher.model
            held = sum(p.to_local().numel() for p in model.parameters() if is_sharded(p))
            if recording.world.is_main:
                share = held / model.num_parameters
                size = budget.settings[0].total_bytes
                figures.write_text(json.dumps({"share": share, "bytes": size}))


def on_ranks(size, path, changes, figures):
    cache = str(path.parent / "cache")
    assert launched(size, as_a_rank, path, changes, cache, figures) == [0] * size


@pytest.mark.parametrize(
    ("size", "form", "changes"),
    [
        (2, TOP_K, ["parallel.shard=always"]),
        pytest.param(3, {"type": "hidden"}, [], marks=pytest.mark.long),
        pytest.param(2, {"type": "samples", "num_draws": 20}, [], marks=pytest.mark.long),
        pytest.param(4, TOP_K, ["parallel.replicate=2"], marks=pytest.mark.long),
        pytest.param(2, TOP_K, ["parallel.shard=none"], marks=pytest.mark.long),
    ],
)
def test_ranks_of_a_sharded_teacher_record_the_store_of_one_process(tmp_path, size, form, changes):
    """Shards differ in length and their number is odd: a rank has less to read than another."""
    path = recorded(tmp_path, form, layers=(1, 3))
    whole = contents(tmp_path / "store")
    shards = len(list((tmp_path / "store").glob("shard-*")))
    assert shards % size
    with Recording(load(path)) as alone:
        expected = alone.budget().settings[0].total_bytes
    shutil.rmtree(tmp_path / "store")
    on_ranks(size, path, changes, tmp_path / "figures.json")
    assert contents(tmp_path / "store") == whole
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["bytes"] == expected
    copies = 2 if "parallel.replicate=2" in changes else 1
    wanted = 0.0 if "parallel.shard=none" in changes else copies / size
    assert figures["share"] == pytest.approx(wanted, abs=0.02)


def stopped_or_failing(path, cache, folder, kind, at):
    """Rank 1 alone is asked to stop, or cannot write, in its third pass."""
    with pytest.MonkeyPatch.context() as patch, StopSignals() as stop:
        patch.setenv("LIMBECK_CACHE", cache)
        calls = 0
        with Recording(load(path)) as recording:
            world = recording.world

            def check():
                nonlocal calls
                calls += 1
                if calls == at and world.rank == 1:
                    if kind == "stop":
                        signal.raise_signal(signal.SIGTERM)
                    else:
                        patch.setattr(ShardWriter, "add", no_room)
                leave_if_asked(stop, world, folder)

            expected = Stopped if kind == "stop" else StorageError
            with pytest.raises(expected) as error:
                recording.record((0, 1), None, check)
            if kind == "stop":
                assert error.value.exit_code == 128 + signal.SIGTERM
            assert calls == at, "every rank left in the same pass"


def no_room(*_):
    raise StorageError("no room on this rank's disk")


@pytest.mark.parametrize("kind", ["stop", pytest.param("fail", marks=pytest.mark.long)])
def test_what_ends_one_rank_ends_all_and_finished_shards_stay(tmp_path, kind):
    path = recorded(tmp_path, TOP_K)
    whole = contents(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    cache, store = str(tmp_path / "cache"), tmp_path / "store"
    assert launched(2, stopped_or_failing, path, cache, store, kind, 25) == [0, 0]
    assert not list(store.glob(".tmp-writing-*"))
    finished = len(list(store.glob("shard-*")))
    assert 0 < finished < read_header(store).num_shards
    record(load(path))
    assert contents(store) == whole
