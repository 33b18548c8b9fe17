"""Work on the chunks of a stream by several processes, with the results in order."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from limbeck.errors import LimbeckError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PROCESSES = 16
"""A process that reads and writes keeps about so many busy."""
ALONE = 2
"""First items that this process works on itself, so that little data needs no others."""
PR_SET_PDEATHSIG = 1


def num_processes() -> int:
    """Processes that this one may keep busy: one a CPU it may use, where it can fork safely."""
    if sys.platform != "linux":
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def in_order(
    work: Callable[[Item], Result], items: Iterator[Item], name: Callable[[Item], str]
) -> Generator[Result, None, None]:
    """The result of each item, in the items' order.

    Each process has one item, so memory is bounded. They are forked: a tokenizer or a row format
    from a user's file cannot be sent to a process that starts afresh. They end with this one.

    Args:
        work: What is computed; it must not depend on earlier calls.
        items: Read here; items and results are sent by pickle.
        name: An item's in messages.

    Raises:
        RunError: A process was killed.
    """
    for _, item in zip(range(ALONE), items, strict=False):
        yield work(item)
    count = num_processes()
    if count == 1:
        yield from map(work, items)
        return
    with ExitStack() as forked:
        busy: deque[tuple[Connection, Item]] = deque()
        for item in items:
            if len(busy) < count:
                pipe = fork(work, forked)
                busy.append((pipe, item))
                pipe.send(item)
                continue
            pipe, before = busy.popleft()
            result: Result = received(pipe, name(before))
            busy.append((pipe, item))
            with suppress(BrokenPipeError):  # killed just now, as `received` will find
                pipe.send(item)
            yield result
        for pipe, before in busy:
            yield received(pipe, name(before))


def fork(work: Callable[[Item], Result], forked: ExitStack) -> Connection:
    """Start a process; the end of its pipe that is ours."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(work, theirs, os.getpid()), daemon=True)
    with warnings.catch_warnings():
        # Of threads that may hold a lock: ours are idle, and the process calls neither torch nor
        # the tokenizers' thread pool.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    forked.callback(process.join)
    forked.callback(process.kill)
    return ours


def serve(work: Callable[[Item], Result], pipe: Connection, parent: int) -> None:
    """Answer items until the parent ends this process, or ends itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to all; the parent decides
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it ended before the line above
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        item = pipe.recv()
        answer: tuple[Result | None, str | LimbeckError]
        try:
            answer = work(item), ""
        except LimbeckError as error:
            answer = None, error
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)


def received(pipe: Connection, name: str) -> Any:
    """A process's result."""
    try:
        result, problem = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RunError(
            f"Tokenising must end, but its process for {name} was killed. Most often memory is "
            "short: look at the kernel's log, and start again."
        ) from error
    if isinstance(problem, LimbeckError):
        raise problem
    if problem:
        raise RuntimeError(f"Tokenising {name} failed:\n{problem}")
    return result
