"""One process in a run directory at a time."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from limbeck.distributed.ranks import World, together
from limbeck.files import locked as locked_file
from limbeck.files import write_text

LOCK = ".lock"
OWNER = ".owner.json"
LEASE_S = 120.0
"""Seconds after which a file server has released the locks of a machine that died; of NFS 90."""


@contextmanager
def locked(folder: Path, world: World, *, resumes: bool = False) -> Iterator[None]:
    """Lock a run directory; the system releases the lock when the process ends in any way.

    Args:
        resumes: Wait for a process on another machine for up to `LEASE_S`: the machine may have
            died, and a file server keeps its lock for a while.

    Raises:
        TryLaterError: Another process holds it; the message says which.
        StorageError: The directory cannot be made or written.
    """
    with ExitStack() as held:

        def acquire() -> None:
            taken = (
                f"Only one process may use {folder} at a time, and {holder(folder)} does. Wait for "
                f"it, or choose another output. The lock is on {folder / LOCK}; a file server may "
                "keep the lock of a machine that died for some minutes."
            )
            who = owner_of(folder)
            is_elsewhere = who is not None and who.get("host") != socket.gethostname()
            patience_s = LEASE_S if resumes and is_elsewhere else 0.0
            held.enter_context(locked_file(folder / LOCK, taken, patience_s=patience_s))
            held.callback((folder / OWNER).unlink, missing_ok=True)
            write_text(folder / OWNER, json.dumps(owner()))

        together(acquire, world, main_only=True)
        yield


def owner() -> dict[str, str | int]:
    """Who this process is, for others to read."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now}


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Who holds a directory, or held it last and died; None where that cannot be read."""
    try:
        who = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return who if isinstance(who, dict) else None


def holder(folder: Path) -> str:
    """Who holds a directory, in words."""
    who = owner_of(folder)
    if who is None or not {"pid", "host", "started"} <= who.keys():
        return "another one"
    return f"process {who['pid']} on {who['host']} (since {who['started']})"
