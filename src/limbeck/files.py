"""Atomic publishing of folders, and verification of what was published.

A directory is written beside its final name, sealed with a manifest (a hash of every file, and of
the manifest itself), synced, and renamed. What has no valid manifest does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from limbeck.errors import ConfigError, StorageError, TryLaterError

MANIFEST = "manifest.json"

MAX_MANIFEST_BYTES = 64 << 20

MAX_JSON_DEPTH = 32
"""Levels of nesting in a manifest or a header; real ones have at most five."""


def scaled(value: int | float, units: Sequence[str]) -> str:
    """Three digits of a value in the largest of its units; each is a thousand of the one before.

    Example:
        >>> scaled(134515008, ["", "k", "M"]), scaled(950, ["", "k", "M"])
        ('135 M', '950')
    """
    power = 0
    while abs(value) >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if not power or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {units[power]}".rstrip()


def size(num_bytes: int | float) -> str:
    """A number of bytes, three digits.

    Example:
        >>> size(538090408), size(1536)
        ('538 MB', '1.54 kB')
    """
    return scaled(num_bytes, ["B", "kB", "MB", "GB", "TB"])


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(path: Path) -> Iterator[Path]:
    """Every file and link below a directory, sorted; directories themselves are not."""
    return (p for p in sorted(path.rglob("*")) if p.is_symlink() or not p.is_dir())


def expanded(path: Path | str) -> Path:
    """A path with `~` and `~user` as folders.

    Raises:
        ConfigError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path} must begin with the home folder of a user, and there is no such user. Write "
            "the whole path."
        ) from None


def nearest_existing(path: Path) -> Path:
    """A path, or its nearest parent that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, taken: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process dies, however it dies.

    Args:
        path: Of the lock file; its folder is made if need be.
        taken: What the error says when another process holds it.
    """
    lock = FileLock(path, timeout=patience_s)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise TryLaterError(taken) from None
    except OSError as error:
        raise StorageError(
            f"{path.parent} must be a folder that can be written, and is not ({error}). Choose "
            "another place."
        ) from error
    try:
        yield
    finally:
        lock.release()


def seal(
    directory: Path, facts: Mapping[str, Any], known: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Write the manifest of everything in a directory, and sync it all.

    Args:
        known: Size and sha256, by name, of files that others have written, synced and hashed.

    Raises:
        StorageError: One of those is not there, or of another size.
    """
    known = {} if known is None else known
    present = {p.relative_to(directory).as_posix(): p for p in files_under(directory)}
    for name, (size_bytes, _) in known.items():
        if name not in present or present[name].stat().st_size != size_bytes:
            raise StorageError(
                f"{directory} must hold {name} with {size_bytes:,} bytes, which another rank has "
                "written, and does not. All ranks need one folder: choose an output on a disk that "
                "all machines share."
            )
    sums = {
        name: known[name] if name in known else [path.stat().st_size, sha256(path)]
        for name, path in present.items()
    }
    (directory / MANIFEST).write_text(sealed_text({"files": sums, **facts}), encoding="utf-8")
    for path in [*directory.rglob("*"), directory]:
        if path.relative_to(directory).as_posix() not in known:
            sync(path)


def publish(final: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Make a directory appear whole or not at all.

    Args:
        final: Its name; must not exist, or be empty.
        write: Called with an empty directory beside `final`, to fill.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{final.parent} must be a folder that can be written, and is none ({error}). Choose "
            "another place."
        ) from error
    temporary = staging(final)
    try:
        temporary.mkdir()
        write(temporary)
        seal(temporary, facts)
        temporary.rename(final)
        sync(final.parent)
    except BaseException as error:  # DCP fails with a BaseException when the disk is full
        raise_if_storage(error, final, temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def staging(final: Path) -> Path:
    """Temporary folder in which a directory is written before it is renamed."""
    return final.parent / f".tmp-{final.name}-{os.getpid()}"


def raise_if_storage(error: BaseException, final: Path, temporary: Path) -> None:
    """Turn a failed write into a `StorageError` where the disk is to blame, else return."""
    free = shutil.disk_usage(final.parent).free
    written = sum(p.lstat().st_size for p in files_under(temporary)) if temporary.exists() else 0
    # Libraries hide ENOSPC in errors of their own, so the disk is asked as well.
    full = "os error 28" in str(error) or "No space left" in str(error) or free < 1 << 20
    if isinstance(error, OSError):
        full = full or error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if not full and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            return
    elif not full:
        return
    raise StorageError(
        f"{final} could not be written after {written:,} bytes ({free:,} bytes free): {error}. "
        "What was there before is intact. Free some space, or choose another place."
    ) from error


def sealed_text(facts: Mapping[str, Any]) -> str:
    """JSON on one line, and its sha256 on the next; `read_sealed` reads it."""
    body = json.dumps(facts, sort_keys=True)
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def read_sealed(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object that `sealed_text` wrote to a file."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is not a regular file")
    if facts.st_size > max_bytes:
        raise ValueError(f"{facts.st_size:,} bytes, at most {max_bytes:,} are read")
    body, digest, _ = path.read_text(encoding="utf-8").split("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ValueError("its own checksum does not match")
    try:
        value = json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    require_shallow(value)
    return value


def require_shallow(value: Mapping[Any, Any]) -> None:
    """Refuse data that is nested so deeply that recursive code could fail on it."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        lists = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in lists for child in each if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")


def raise_if_too_many_open(error: Exception) -> None:
    """Turn an error about file descriptors into a `StorageError`; return for any other."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise StorageError(
            f"A file could not be opened, but is not damaged: {error}. Raise the limit of open "
            "files (`ulimit -n`), or close what else the process has open."
        ) from error


def sealed_manifest(path: Path) -> dict[str, Any] | None:
    """A directory's manifest, if it is intact; the files it names are not read."""
    try:
        facts = read_sealed(path / MANIFEST, MAX_MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        raise_if_too_many_open(error)
        return None
    return facts if isinstance(facts.get("files"), dict) else None


def manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete, unchanged directory; None for anything else."""
    return sealed_manifest(path) if damage(path) is None else None


def damage(path: Path) -> str | None:
    """How a directory differs from its manifest, for a message; None if it does not."""
    facts = sealed_manifest(path)
    if facts is None:
        return f"{MANIFEST} is missing or damaged"
    wanted = facts["files"]
    try:
        present = {p.relative_to(path).as_posix(): p for p in files_under(path)}
        del present[MANIFEST]
        for name in sorted(present.keys() | wanted.keys()):
            if name not in present:
                return f"{name} is missing"
            if name not in wanted:
                return f"{name} is not in {MANIFEST}"
            if not has_content(present[name], *wanted[name]):
                return f"{name} was changed after it was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise_if_too_many_open(error)
        return f"a file cannot be read ({error})"
    return None


def has_content(path: Path, size_bytes: int, digest: str) -> bool:
    """Whether a path is a regular file, not a link, of this size and sha256."""
    facts = path.lstat()
    # The type and the size are compared first: reading a FIFO would block for ever.
    if not stat.S_ISREG(facts.st_mode) or facts.st_size != size_bytes:
        return False
    return sha256(path) == digest


def set_aside(path: Path, why: str) -> Path:
    """Rename to `WHY-NAME-0`, or to the next number that is not taken; nothing is deleted."""
    number = 0
    while os.path.lexists(aside := path.with_name(f"{why}-{path.name}-{number}")):
        number += 1
    return path.rename(aside)


def sweep(parent: Path) -> None:
    """Remove what killed processes left half-written; call it under the directory's lock."""
    for stale in parent.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step: the old text or the new, never a part."""
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}"
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} could not be written: {error}.") from error
