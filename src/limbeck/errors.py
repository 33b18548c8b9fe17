"""Every way a run can fail on purpose, each with the exit code a scheduler acts on.

A message says what must hold, the value found and where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LimbeckError(Exception):
    """Base of every error limbeck raises on purpose."""

    exit_code = 4


class ConfigError(LimbeckError, ValueError):
    """The recipe or the command is invalid, or its options contradict each other."""

    exit_code = 2


class DataError(LimbeckError, ValueError):
    """Data on disk cannot be used as the recipe says, or is damaged."""

    exit_code = 3


class RunError(LimbeckError, RuntimeError):
    """The run failed and can be resumed from its last checkpoint."""

    exit_code = 4


class NonFiniteError(LimbeckError, ArithmeticError):
    """Losses or gradients are not finite; they were not used for an optimizer step."""

    exit_code = 5


class StorageError(LimbeckError, OSError):
    """The disk is full, or a path may not be read or written."""

    exit_code = 6


class TryLaterError(LimbeckError):
    """A lock is held, or a server does not respond: the same command may work later."""

    exit_code = 75


class Stopped(LimbeckError):  # noqa: N818  (stopping when asked to is not an error)
    """A signal asked the run to stop, and it saved first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def extra_needed(what: str, package: str, extra: str) -> Iterator[None]:
    """Around imports of a package that only an extra of limbeck installs.

    Raises:
        ConfigError: It cannot be imported; with the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {package}, which cannot be imported here ({error}): pip install "
            f"'limbeck[{extra}]'."
        ) from error
