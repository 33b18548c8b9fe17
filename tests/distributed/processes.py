"""Real processes for tests: ranks that talk, and lives that end."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import torch
import torch.distributed as dist

from limbeck.distributed import world

PATIENCE_S = 120


def context() -> ForkServerContext:
    """A server that imports once and forks quickly; it has no threads when it does."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.train.toy", "limbeck.commands.check"])
    return server


def renew_threads() -> None:
    """Call it first in a forked process.

    The first use of torch's pool of threads after a fork makes a new one. Threads of autograd that
    did this at the same time ended the process with "Invalid thread pool".
    """
    torch.set_num_threads(1)


def live(function: Callable[..., None], *args: object) -> int:
    """Run a function in a process of its own; returns its exit code, minus a signal's number."""
    process = context().Process(target=forked, args=(function, *args))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def forked(function: Callable[..., None], *args: object) -> None:
    """Run a function in a process that was just forked."""
    renew_threads()
    function(*args)


def on_ranks(
    size: int,
    function: Callable[..., None],
    *args: object,
    spread: str = "auto",
    replicate: int = 1,
) -> None:
    """Run a function on every rank of a world, as torchrun would; its first argument is the world.

    Each must end well.
    """
    assert ranks(size, function, *args, spread=spread, replicate=replicate) == [0] * size


def ranks(
    size: int,
    function: Callable[..., None],
    *args: object,
    spread: str = "auto",
    replicate: int = 1,
) -> list[int]:
    """As `on_ranks`, returning the exit codes."""
    return launched(size, join, spread, replicate, function, *args)


def served_store() -> dist.TCPStore:
    """A store of keys as torchrun serves it: it outlives the process groups of its workers."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def launched(size: int, function: Callable[..., None], *args: object) -> list[int]:
    """Run a function in processes with torchrun's environment; their exit codes."""
    server, store = context(), served_store()
    started = [
        server.Process(target=launch, args=(rank, size, store.port, function, *args))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert None not in codes, f"a rank hangs: {codes}"
    return [int(code or 0) for code in codes]


def launch(rank: int, size: int, port: int, function: Callable[..., None], *args: object) -> None:
    """Be one of torchrun's workers."""
    renew_threads()
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    function(*args)


def join(spread: str, replicate: int, function: Callable[..., None], *args: object) -> None:
    """Become one rank."""
    with world(torch.device("cpu"), spread, replicate=replicate) as here:
        function(here, *args)
