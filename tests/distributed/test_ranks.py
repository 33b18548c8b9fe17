"""Which processes have a mesh."""

import os
import socket
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from limbeck.distributed import broadcast_object, world
from limbeck.distributed.ranks import late_ranks_named, launchers_store, place_of, process_group
from limbeck.errors import ConfigError, RunError
from tests.distributed.processes import context, launched, served_store


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), None),
        (("none",), None),
        (("always",), (1,)),
    ],
)
def test_one_process_has_a_mesh_where_the_recipe_asks_for_what_only_fsdp2_does(options, shape):
    with world(torch.device("cpu"), *options) as here:
        assert (here.rank, here.size) == (0, 1)
        assert (None if here.mesh is None else here.mesh.shape) == shape


def test_a_device_without_collectives_is_refused():
    refused = pytest.raises(ConfigError, match="need CPU or CUDA, got device 'mps'")
    with refused, world(torch.device("mps"), "always"):
        pass


@pytest.mark.parametrize("options", [("auto",), ("always",)])
def test_copies_must_divide_the_ranks(options):
    refused = pytest.raises(ConfigError, match=r"parallel\.replicate = 2 and 1 rank\.")
    with refused, world(torch.device("cpu"), *options, replicate=2):
        pass


def with_a_late_rank(rank, port, late_s, words):
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    refused = pytest.raises(RunError, match=words)
    with refused, world(torch.device("cpu"), timeout_s=2) as here:
        if rank == 1:
            time.sleep(late_s)
        broadcast_object("what rank 0 decides", here)


def one_world_after_another(own_port=None):
    if own_port is not None:  # without torchrun rank 0 serves the store
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
        os.environ["MASTER_PORT"] = str(own_port)
    for stage in range(2):
        if stage and os.environ["RANK"] == "0":
            time.sleep(1)  # the others look for it, and must not find where it was before
        with world(torch.device("cpu"), timeout_s=20 + stage) as here:
            assert broadcast_object(stage, here) == stage


def waits_as_long_in_every_group(replicate, shape):
    cpu = torch.device("cpu")
    with world(cpu, timeout_s=47, replicate=replicate) as here:
        assert here.mesh.shape == shape
        groups = [here.mesh.get_group(n) for n in range(here.mesh.ndim)]
        limits = {each._get_backend(cpu).options._timeout.total_seconds() for each in groups}
        assert limits == {47}
        row, column = divmod(here.rank, shape[-1])
        assert list(here.mesh.get_coordinate()) == [row, column][-len(shape) :]


@pytest.mark.parametrize(("size", "replicate", "shape"), [(2, 1, (2,)), (4, 2, (2, 2))])
def test_every_group_of_a_mesh_has_the_recipes_time_out(size, replicate, shape):
    assert launched(size, waits_as_long_in_every_group, replicate, shape) == [0] * size


def test_ranks_join_one_world_after_another():
    """As the stages of a recipe do; torchrun's store keeps the keys of the first world."""
    assert launched(2, one_world_after_another) == [0, 0]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        own_port = free.getsockname()[1]
    assert launched(2, one_world_after_another, own_port) == [0, 0]


@pytest.mark.parametrize(
    ("backend", "fails", "times"), [("nccl", True, 0), ("nccl", False, 1), ("gloo", True, 1)]
)
def test_after_an_error_a_group_of_nccl_is_not_destroyed(monkeypatch, backend, fails, times):
    """To destroy it waits for a collective of the others. NCCL itself needs a GPU."""
    destroyed, store = [], served_store()
    launched_as(monkeypatch, MASTER_PORT=store.port, RANK=0, WORLD_SIZE=1)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(backend))
    refused = pytest.raises(RuntimeError) if fails else nullcontext()
    with refused, process_group(backend, alone=False):
        if fails:
            raise RuntimeError
    assert len(destroyed) == times


def launched_as(monkeypatch, **variables):
    variables |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    launchers_store.cache_clear()


NCCL_ERROR = """NCCL error in: NCCLUtils.cpp:93, invalid usage (run with NCCL_DEBUG=WARN)
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5000"""


def test_the_cause_that_nccl_names_in_its_last_line_is_shown():
    words = "(?s)rank 0 could not in .*Duplicate GPU detected"
    with pytest.raises(RunError, match=words) as caught, late_ranks_named(30):
        raise dist.DistBackendError(NCCL_ERROR)
    assert "did not come" not in str(caught.value)


def test_a_peer_of_nccl_that_ended_is_one_that_did_not_come():
    gone = "NCCL error\nncclRemoteError: A call failed possibly due to a network error or a remote "
    refused = pytest.raises(RunError, match="another rank did not come: NCCL error That rank")
    with refused, late_ranks_named(30):
        raise dist.DistBackendError(gone + "process exiting prematurely.")


def test_cuda_ranks_without_a_number_on_their_machine_are_refused(monkeypatch):
    """Each would take card 0, which NCCL refuses as a duplicate."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launched_as(monkeypatch, RANK=0, WORLD_SIZE=2)
    with pytest.raises(ConfigError, match="LOCAL_RANK"), world(torch.device("cuda")):
        pass


def test_only_functions_of_limbeck_are_named_as_the_place_of_an_error():
    """The repository, with its environment, is often cloned into a folder called limbeck."""
    code = compile("def wait():\n    raise RuntimeError", "/x/limbeck/lib/c10d.py", "exec")
    library = {}
    exec(code, library)
    with pytest.raises(RuntimeError) as caught:
        library["wait"]()
    assert place_of(caught.value) == "torch.distributed"


def test_a_collective_without_one_rank_fails_with_a_message_that_names_it():
    """Rank 0 gives up after timeout_s; rank 1 then finds that rank 0 is gone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    begin = (
        r"Rank {} waited in distributed\.ranks\.\w+ of distributed\.ranks\.gather_objects, and "
        r"another rank did not come: .*parallel\.timeout_s = 2 s.*--resume"
    )
    started = [
        context().Process(target=with_a_late_rank, args=(rank, port, 6, begin.format(rank)))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
