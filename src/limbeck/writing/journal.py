"""A file of rows that grows batch by batch, and a file with its progress."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.config import differences, refuse_differences
from limbeck.errors import ConfigError, DataError, StorageError
from limbeck.files import locked, write_text

SUFFIX = ".provenance"
"""Of the file with what is known: no name that `data` would read as rows."""


@dataclass
class FileProgress:
    """What has been written.

    Attributes:
        batches: Number of finished ones.
        bytes: Size of the file after them.
        kept: Rows in the file.
        tokens: Of those rows' answers.
        ended: Rows whose answer has an end token.
        dropped: Answers that are not in the file, by reason.
    """

    batches: int = 0
    bytes: int = 0
    sha256: str = field(default_factory=lambda: hashlib.sha256().hexdigest())
    kept: int = 0
    tokens: int = 0
    ended: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class Journal:
    """The file; use `opened`.

    A batch's rows are appended and synced before the progress is replaced. What a killed process
    has appended beyond it, torn lines included, is cut off when the file is opened again.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self._path, self._facts = path, {**facts, "settings": settings}
        self._beside = path.with_name(path.name + SUFFIX)
        self.progress = self._resumed(settings)
        self._digest = hashlib.sha256()
        self._cut()

    def _resumed(self, settings: Mapping[str, Any]) -> FileProgress:
        """Progress of an earlier process, if it had the same settings."""
        if not self._beside.exists():
            if self._path.exists():
                raise ConfigError(
                    f"write.output: {self._path} exists and was not written by limbeck write, or "
                    f"its {self._beside.name} is missing. Choose another file."
                )
            return FileProgress()
        try:
            saved = json.loads(self._beside.read_text(encoding="utf-8"))
            found = FileProgress(**saved["progress"])
            before = saved["settings"]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{self._beside} must be the provenance that limbeck write keeps, and cannot be "
                f"read: {error}. Delete it with {self._path.name}, and start again."
            ) from error
        require_same(before, settings, self._path)
        return found

    def _cut(self) -> None:
        """Cut off what is beyond the progress, and check the rest."""
        wanted = self.progress.bytes
        size = self._path.stat().st_size if self._path.exists() else 0
        if size >= wanted and self._path.exists():
            with self._path.open("rb+") as file:
                file.truncate(wanted)
                for block in iter(lambda: file.read(1 << 20), b""):
                    self._digest.update(block)
        if size < wanted or self._digest.hexdigest() != self.progress.sha256:
            raise DataError(
                f"{self._path} must hold the {wanted:,} bytes that were written, and was changed "
                "since. Move it and its provenance away and write again, or train on it as it is."
            )

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are there."""
        if self._path.exists():
            with self._path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of a finished batch, and save the progress."""
        body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            with self._path.open("ab") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self._path} could not be written: {error}. Earlier batches are intact; free "
                "some space and run the same command to continue."
            ) from error
        self._digest.update(body)
        self.progress.batches += 1
        self.progress.bytes += len(body)
        self.progress.sha256 = self._digest.hexdigest()
        self.save()

    def save(self) -> None:
        """Save the progress."""
        whole = {**self._facts, "progress": asdict(self.progress)}
        write_text(self._beside, json.dumps(whole, indent=1, ensure_ascii=False))


@contextmanager
def opened(path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Journal]:
    """A file to append to, by one process at a time.

    Args:
        settings: What the rows depend on; a file is resumed with the same only.
        facts: Also kept in the provenance.

    Raises:
        ConfigError: The file was begun with other settings, or is not one of limbeck's.
        DataError: It was changed.
        TryLaterError: Another process writes it.
    """
    taken = f"Only one process may write {path}, and another one does. Wait for it."
    with locked(path.parent / f".{path.name}.lock", taken):
        journal = Journal(path, settings, facts)
        journal.save()
        yield journal


def require_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse other settings than a file was begun with, by name."""
    refuse_differences(
        differences(before, now),
        f"{path} is continued with the settings it was begun with. Put these back, or choose "
        "another write.output:",
    )
