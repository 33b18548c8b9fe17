"""Sinks of a run's metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from limbeck.errors import StorageError
from limbeck.files import write_text

Record = Mapping[str, Any]
"""A message of a run, JSON. `kind` is `step`, `evaluation`, `non_finite` or `note`."""


@runtime_checkable
class MetricSink(Protocol):
    """Receives records; only rank 0 has sinks."""

    def begin(self, step: int, steps: int) -> None:
        """A run of `steps` starts after `step` of them; records of later steps are discarded."""

    def write(self, record: Record) -> None:
        """Write one record."""

    def close(self) -> None:
        """Release what `begin` opened."""


class JsonlSink:
    """A file with one record a line, flushed after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def begin(self, step: int, steps: int) -> None:
        """Keep the lines up to a step, so that no step is recorded twice after resuming."""
        kept = [line for line in self._lines() if int(json.loads(line).get("step", 0)) <= step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(f"{line}\n" for line in (kept if step else [])))
        self._file = self._path.open("a", encoding="utf-8")

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        whole = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        return [line for line in whole if is_json(line)]

    def write(self, record: Record) -> None:
        """Append a record."""
        assert self._file is not None, "begin() comes first"
        try:
            self._file.write(f"{json.dumps(dict(record), allow_nan=False)}\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self._path} could not be written: {error}. Free some space and resume."
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def is_json(line: str) -> bool:
    """Whether a line is a JSON object; an incomplete last line is not."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
