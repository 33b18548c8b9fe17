"""Publishing files so that what is there is whole, and telling when it is not.

A directory is written beside its final name, sealed with a manifest (a hash of every file, and of
the manifest itself), synced, and renamed. What has no valid manifest does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import StorageError

MANIFEST = "manifest.json"

MOST_MANIFEST_BYTES = 64 << 20


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(path: Path) -> Iterator[Path]:
    """Every file and link below a directory, sorted; directories themselves are not."""
    return (p for p in sorted(path.rglob("*")) if p.is_symlink() or not p.is_dir())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of everything in a directory, and sync it all."""
    sums = {
        p.relative_to(directory).as_posix(): [p.stat().st_size, sha256(p)]
        for p in files_under(directory)
    }
    body = json.dumps({"files": sums, **facts}, sort_keys=True)
    stamp = hashlib.sha256(body.encode()).hexdigest()
    (directory / MANIFEST).write_text(f"{body}\n{stamp}\n", encoding="utf-8")
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def publish(final: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Make a directory appear whole or not at all.

    Args:
        final: Its name; must not exist, or be empty.
        write: Called with an empty directory beside `final`, to fill.
        facts: Kept in the manifest, JSON.

    Raises:
        StorageError: The disk is full, or may not be written; nothing is left behind.
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
    """Where a directory is written before it gets its name: beside it, as a rename needs."""
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


def sealed_manifest(path: Path) -> dict[str, Any] | None:
    """What a directory's manifest says, if the manifest itself is whole; no other file is read."""
    try:
        if (path / MANIFEST).stat().st_size > MOST_MANIFEST_BYTES:
            return None
        body, stamp, _ = (path / MANIFEST).read_text(encoding="utf-8").split("\n")
        wanted: dict[str, Any] = json.loads(body)
    except (OSError, ValueError):
        return None
    return wanted if hashlib.sha256(body.encode()).hexdigest() == stamp else None


def manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a whole, unchanged directory; None for anything else."""
    wanted = sealed_manifest(path)
    try:
        if wanted is None:
            return None
        found = {p.relative_to(path).as_posix(): p for p in files_under(path)}
        found.pop(MANIFEST)
        whole = found.keys() == wanted["files"].keys() and all(
            not p.is_symlink() and [p.stat().st_size, sha256(p)] == wanted["files"][name]
            for name, p in found.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return wanted if whole else None


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
