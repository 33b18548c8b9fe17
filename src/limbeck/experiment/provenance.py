"""Facts for provenance.json: versions, machine, command."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def now() -> str:
    """The present, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def host_facts(device: str, world_size: int) -> dict[str, Any]:
    """The machine and the libraries; nothing that names a user or a path."""
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "world_size": world_size,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
    }


def command_line() -> list[str]:
    """The command line, with the program's name only."""
    return [os.path.basename(sys.argv[0]), *sys.argv[1:]]
