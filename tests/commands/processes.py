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


class Command:
    """A command that runs, with everything it prints in one file."""

    def __init__(self, *arguments, cwd):
        self._printed = cwd / ".printed"
        self._process = begin(arguments, cwd, [self._printed] * 2)

    @property
    def is_running(self):
        return self._process.exitcode is None

    def send(self, number):
        """Send a signal."""
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()
        self._process.join()

    def finish(self, code=0):
        """Wait for its end, which must be with `code`; what it printed."""
        self._process.join(PATIENCE_S)
        self._process.kill()
        printed = self._printed.read_text(encoding="utf-8")
        assert self._process.exitcode == code, printed
        return printed


def limbeck(*arguments, cwd, code=0):
    """Run a command in a folder; it must end with `code` and without a traceback."""
    printed = [cwd / ".stdout", cwd / ".stderr"]
    process = begin(arguments, cwd, printed)
    process.join(PATIENCE_S)
    process.kill()
    done = Done(*(path.read_text(encoding="utf-8") for path in printed))
    for path in printed:
        path.unlink()
    assert process.exitcode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def begin(arguments, cwd, printed):
    """Start a command in a folder; stdout and stderr go to two files, or one."""
    environment = {**os.environ, "LIMBECK_CACHE": str(cwd / "cache"), "COLUMNS": "200"}
    process = context().Process(target=become, args=(arguments, cwd, environment, printed))
    process.start()
    return process


def become(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], printed: list[Path]):
    """What `python -m limbeck` does in a new process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for path in printed:
        path.write_bytes(b"")
    for descriptor, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = ["limbeck", *map(str, arguments)]
    commands.main()
