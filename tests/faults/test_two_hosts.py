"""Two hosts, of which one is lost and comes back: torchrun over two network namespaces."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from limbeck.distributed import latest
from limbeck.files import damage
from tests.experiment.tiny_run import steps_of, write_recipe

PATIENCE_S = 180
HOSTS = {"limbeck-a": "10.77.41.1", "limbeck-b": "10.77.41.2"}
HEAD = "10.77.41.1:29741"


def command(*words):
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable; each name is also that of its network interface."""
    first, second = HOSTS
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, for network namespaces")
    made = command("ip", "netns", "add", first)
    if made.returncode:
        pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    started = []
    try:
        lines = [f"netns add {second}", f"link add {first} type veth peer name {second}"]
        for name, address in HOSTS.items():
            lines += [f"link set {name} netns {name}", f"-n {name} link set lo up"]
            lines += [
                f"-n {name} addr add {address}/24 dev {name}",
                f"-n {name} link set {name} up",
            ]
        for line in lines:
            made = command("ip", *line.split())
            assert made.returncode == 0, f"ip {line}: {made.stderr}"
        yield started
    finally:
        for name in HOSTS:
            kill_host(name)
            command("ip", "netns", "del", name)
        for process in started:
            process.wait()


def kill_host(name):
    """Kill every process of a host; torchrun's workers are in sessions of their own."""
    for pid in command("ip", "netns", "pids", name).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def launch(started, host, folder, log):
    """Start torchrun on a host."""
    is_head = HOSTS[host] == HEAD.split(":", maxsplit=1)[0]
    line = f"ip netns exec {host} {sys.executable} -m torch.distributed.run --nnodes 1:2"
    line += " --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id run"
    line += f" --rdzv-endpoint {HEAD} --local-addr {HOSTS[host]} --rdzv-conf"
    line += f" is_host={int(is_head)},last_call_timeout=2,join_timeout=60"
    line += " -m limbeck distill recipe.yaml --resume"
    with (folder / log).open("w") as file:
        process = subprocess.Popen(
            line.split(),
            cwd=folder,
            env={
                **os.environ,
                "GLOO_SOCKET_IFNAME": host,
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a host that comes back waits
                "LIMBECK_CACHE": str(folder / "cache"),
                "OMP_NUM_THREADS": "1",
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    started.append(process)
    return process


def records(folder):
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_until(holds, process, folder):
    """Until something holds of the records of a run."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if holds(records(folder)):
            return
        time.sleep(0.1)
    logs = "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("*.log")))
    raise AssertionError(f"exit code {process.poll()}\n{logs}")


def step_after(step):
    return lambda found: any(r["kind"] == "step" and r["step"] > step for r in found)


def newest(folder):
    return max((r["step"] for r in records(folder) if r["kind"] == "step"), default=0)


def recipe(folder):
    folder.mkdir()
    write_recipe(
        folder,
        optim={"steps": 100_000},
        evaluate={"every": 100_000},
        checkpoint={"every": 10},
        parallel={"timeout_s": 20},
    )
    return folder


def alone(folder, steps):
    """The same run on one process, killed after so many steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "distill", "recipe.yaml"],
        cwd=folder,
        env={**os.environ, "LIMBECK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(step_after(steps), process, folder)
    process.kill()
    process.wait()
    return [r["loss"] for r in steps_of(folder / "run")]


@pytest.mark.long
def test_a_run_loses_a_host_continues_on_one_and_takes_the_host_back(hosts, tmp_path):
    folder = recipe(tmp_path / "two")
    first = launch(hosts, "limbeck-a", folder, "first.log")
    second = launch(hosts, "limbeck-b", folder, "second.log")
    wait_until(step_after(25), first, folder)
    command("ip", "-n", "limbeck-b", "link", "set", "limbeck-b", "down")  # no word of farewell
    kill_host("limbeck-b")
    second.wait()
    lost_at = newest(folder)
    wait_until(step_after(lost_at + 30), first, folder)
    told = (folder / "first.log").read_text()
    assert "another rank did not come" in told
    assert "parallel.timeout_s = 20 s" in told
    command("ip", "-n", "limbeck-b", "link", "set", "limbeck-b", "up")
    back = launch(hosts, "limbeck-b", folder, "back.log")
    wait_until(lambda found: len(resumed(found)) == 2, first, folder)
    wait_until(step_after(resumed(records(folder))[1] + 30), first, folder)
    for process in (first, back):
        os.kill(process.pid, signal.SIGTERM)
    for process in (first, back):
        process.wait(PATIENCE_S)
    saved = latest(folder / "run" / "checkpoints")
    assert saved is not None
    assert damage(saved) is None
    assert lost_at - 11 <= resumed(records(folder))[0] <= lost_at + 2
    losses = [r["loss"] for r in steps_of(folder / "run")]
    expected = alone(recipe(tmp_path / "one"), len(losses))
    assert losses == pytest.approx(expected[: len(losses)], rel=1e-4)


def resumed(found):
    """Steps at which a run was resumed."""
    return [r["step"] for r in found if r["kind"] == "note" and "resumed at" in json.dumps(r)]
