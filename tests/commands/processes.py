"""The command line in processes of its own, forked from a server that has imported limbeck.

Importing torch and transformers takes seconds, and these tests start limbeck sixty times.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

from limbeck import commands
from tests.distributed.processes import context

PATIENCE_S = 300


class Done(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


def limbeck(*arguments, cwd, code=0):
    """Run a command in a folder; it must end with `code` and without a traceback."""
    environment = {**os.environ, "LIMBECK_CACHE": str(cwd / "cache"), "COLUMNS": "200"}
    printed = [cwd / ".stdout", cwd / ".stderr"]
    process = context().Process(target=become, args=(arguments, cwd, environment, printed))
    process.start()
    process.join(PATIENCE_S)
    process.kill()
    done = Done(*(path.read_text(encoding="utf-8") for path in printed))
    for path in printed:
        path.unlink()
    assert process.exitcode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def become(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], printed: list[Path]):
    """What `python -m limbeck` does in a new process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["limbeck", *map(str, arguments)]
    commands.main()
