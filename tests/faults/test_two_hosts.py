"""Two hosts, in network namespaces of this machine: one dies, the other goes on, both resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.experiment.house import steps_of, write_recipe

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENCE_S = 300


def ip(*arguments):
    return subprocess.run(
        ["ip", *arguments], check=False, capture_output=True, text=True, timeout=20
    )


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"limbeck-{os.getpid()}-{number}" for number in (0, 1)]
    cable = [f"lb{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for name in names:
            if ip("netns", "add", name).returncode:
                pytest.skip("network namespaces may not be made here")
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            for line in (
                f"link set {end} netns {name}",
                f"-n {name} addr add {address}/24 dev {end}",
                f"-n {name} link set {end} up",
                f"-n {name} link set lo up",
            ):
                done = ip(*line.split())
                if done.returncode:
                    pytest.skip(f"network namespaces cannot be joined here: {done.stderr}")
        yield list(zip(names, cable, ADDRESSES, strict=True))
    finally:
        for name in names:
            die(name)
            ip("netns", "delete", name)


def die(name):
    """Kill everything that runs in a namespace, launcher and workers, as a power cut does."""
    for pid in ip("netns", "pids", name).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def start(host, folder, log):
    """The documented line for several nodes, of which one may be absent."""
    name, cable, address = host
    is_first = address == ADDRESSES[0]
    settings = f"is_host={int(is_first)},last_call_timeout=4,keep_alive_interval=1"
    environment = {
        **os.environ,
        "LIMBECK_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": cable,
    }
    launcher = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--local-addr", address]
    launcher += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29700", "--rdzv-conf", settings]
    return subprocess.Popen(
        [*launcher, "-m", "limbeck", "distill", "recipe.yaml", "--resume"],
        cwd=folder,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(folder, world_size, more_steps):
    """Until a run of so many ranks has taken so many steps more than when this was called."""
    metrics, provenance = folder / "run" / "metrics.jsonl", folder / "run" / "provenance.json"
    deadline, first = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if not provenance.exists() or not metrics.exists():
            continue
        if json.loads(provenance.read_text())["host"]["world_size"] != world_size:
            continue
        step = max([each["step"] for each in steps_of(folder / "run")], default=0)
        first = step if first is None else min(first, step)
        if step >= first + more_steps:
            return step
    log = (folder / "log").read_text()
    raise AssertionError(f"{world_size} ranks never took {more_steps} steps: {log[-3000:]}")


@pytest.mark.long
def test_a_host_that_dies_costs_a_checkpoint_and_comes_back(tmp_path, hosts):
    settings = {
        "optim": {"steps": 100_000, "schedule": "constant"},
        "checkpoint": {"every": 10},
        "evaluate": {"data": None},
        "parallel": {"timeout_s": 60},
    }
    write_recipe(tmp_path, **settings)
    with (tmp_path / "log").open("w") as log:
        first, second = (start(host, tmp_path, log) for host in hosts)
        both = wait_for(tmp_path, 2, 15)
        die(hosts[1][0])
        second.wait(timeout=20)
        alone = wait_for(tmp_path, 1, 15)
        assert alone > both - 10, "at most the steps since the last checkpoint are lost"
        second = start(hosts[1], tmp_path, log)
        again = wait_for(tmp_path, 2, 15)
        first.terminate()  # `ip netns exec` has become torchrun
        first.wait(timeout=120)
    assert again > alone
    steps = steps_of(tmp_path / "run")
    assert [each["step"] for each in steps] == list(range(1, len(steps) + 1))
    alone_folder = tmp_path / "alone"
    alone_folder.mkdir()
    write_recipe(alone_folder, **{**settings, "optim": {"steps": 60, "schedule": "constant"}})
    environment = {**os.environ, "LIMBECK_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "limbeck", "distill", "recipe.yaml"]
    subprocess.run(command, cwd=alone_folder, env=environment, check=True, capture_output=True)
    for mine, theirs in zip(steps, steps_of(alone_folder / "run"), strict=False):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["tokens"] == theirs["tokens"]
