"""One process in a run directory at a time."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from limbeck.distributed.ranks import World, together
from limbeck.files import locked as locked_file
from limbeck.files import write_text

LOCK = ".lock"
OWNER = ".owner.json"


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Lock a run directory; the system releases the lock when the process ends in any way.

    Raises:
        TryLaterError: Another process holds it; the message says which.
        StorageError: The directory cannot be made or written.
    """
    with ExitStack() as held:

        def acquire() -> None:
            taken = (
                f"Only one process may use {folder} at a time, and {holder(folder)} does. Wait for "
                "it, or choose another output."
            )
            held.enter_context(locked_file(folder / LOCK, taken))
            held.callback((folder / OWNER).unlink, missing_ok=True)
            write_text(folder / OWNER, json.dumps(owner()))

        together(acquire, world, main_only=True)
        yield


def owner() -> dict[str, str | int]:
    """Who this process is, for others to read."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now}


def holder(folder: Path) -> str:
    """Who holds a directory, in words."""
    try:
        who = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} (since {who['started']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another one"
