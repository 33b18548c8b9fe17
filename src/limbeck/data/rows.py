"""Rows of data, each with the place it came from.

JSON Lines are read a line at a time and parsed here, so that every error names a file and a line.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import pyarrow
import pyarrow.parquet

from limbeck.config import ReadConfig
from limbeck.config.paths import ALL_SUFFIXES, SUFFIXES, TEXT_SUFFIXES, missing_text
from limbeck.errors import ConfigError, DataError, StorageError
from limbeck.files import expanded, sha256

KNOWN_SUFFIXES = ", ".join(ALL_SUFFIXES)
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        file: Index of its file in the source's labels.
        number: Its line, or its row where a file has no lines; from 1.
        problem: Why it could not be read; then it has no columns.
    """

    file: int
    number: int
    values: dict[str, Any]
    problem: str = ""


@runtime_checkable
class ReadRows(Protocol):
    """Reads rows, from the first one."""

    def __call__(self, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Row]:
        """Rows with some columns; those of JSON Lines have all that the line has.

        Args:
            columns: Required columns; with none, all columns are read.
            optional: Columns that are read if present.
        """


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        labels: Path of each file, for error messages.
        names: Paths relative to the data folder, for files that may be published.
        digest: Computes `sha256`.
        rows: Reads the rows; may be called again.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    digest: Callable[[], str]
    rows: ReadRows

    @cached_property
    def sha256(self) -> str:
        """Hash of all of it, computed when first read."""
        return self.digest()


def open_source(config: ReadConfig, cache: Path) -> Source:
    """The rows behind a configuration's path: a file, a folder of them, or a Hugging Face data set.

    Of a folder, files of rows are read if there are any, and plain text files otherwise, each as
    one text. A folder is read as a data set where it was saved as one, or a subset is named.

    Args:
        cache: Where a downloaded data set is kept if the user's own cache cannot be written.
    """
    path = config.path
    here = expanded(path)
    if here.is_dir() and (config.subset or config.streaming or is_saved(here)):
        return data_set(config, cache)
    if here.exists() and (config.subset or config.streaming or config.revision):
        raise ConfigError(
            f"data.path: {path} is not read as a data set of the Hub, to which subset, revision "
            "and streaming belong. Remove them."
        )
    if here.is_dir():
        found = [p for p in sorted(here.rglob("*")) if p.is_file()]
        seen = [p for p in found if not is_hidden(p.relative_to(here))]
        files = [p for p in seen if p.name.endswith(SUFFIXES)]
        files = files or [p for p in seen if p.name.endswith(TEXT_SUFFIXES)]
        if not files:
            raise ConfigError(
                f"data.path: {path} must hold files ending in {KNOWN_SUFFIXES}, and has none."
            )
        return from_files(files, here)
    if here.exists():
        if not here.name.endswith(ALL_SUFFIXES):
            raise ConfigError(
                f"data.path: {path} must end in one of {KNOWN_SUFFIXES}. Rename or convert it."
            )
        return from_files([here], here.parent)
    if problem := missing_text(path):
        raise ConfigError(f"data.path: {problem}")
    return data_set(config, cache)


def data_set(config: ReadConfig, cache: Path) -> Source:
    """The rows of a Hugging Face data set."""
    # the library takes seconds to import, and most runs read files of their own
    hub = importlib.import_module("limbeck.data.hub")
    source: Source = hub.from_hub(config, cache)
    return source


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def stem(path: str) -> str:
    """The last part of a path, without the suffix of a data file.

    Example:
        >>> stem("data/code.jsonl.gz"), stem("org/v1.5"), stem("texts/")
        ('code', 'v1.5', 'texts')
    """
    name = PurePath(path).name
    return next((name.removesuffix(s) for s in ALL_SUFFIXES if name.endswith(s)), name)


def is_hidden(path: Path) -> bool:
    """Whether a path below a data folder is a dot file or in a dot folder, which are skipped."""
    return any(part.startswith(".") for part in path.parts)


def from_files(files: Sequence[Path], folder: Path) -> Source:
    """Rows of files below a folder, one after another."""
    labels = tuple(map(str, files))
    names = tuple(file.relative_to(folder).as_posix() for file in files)

    def digest() -> str:
        try:
            sums = [sha256(file) for file in files]
        except OSError as error:
            raise StorageError(f"{error.filename} cannot be read: {error.strerror}.") from error
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    def rows(columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Row]:
        for index, file in enumerate(files):
            yield from read_file(file, index, columns, optional)

    return Source(labels, names, digest, rows)


def read_file(
    path: Path, index: int, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[Row]:
    """Rows of one file; see `ReadRows`."""
    try:
        if path.suffix == ".parquet":
            yield from read_parquet(path, index, columns, optional)
            return
        if path.suffix in TEXT_SUFFIXES:
            yield read_text(path, index)
            return
        with open_bytes(path) as file:
            if ".json" in path.suffixes and first_byte(path) == b"[":
                yield from read_array(path, file.read(), index)
            else:
                yield from read_lines(file, index)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} must be a whole gzip file, and is damaged: {error}. Fetch or pack it again."
        ) from error
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from error


def open_bytes(path: Path) -> gzip.GzipFile | BufferedReader:
    """A file's bytes, decompressed if its name ends in .gz."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    named = path.suffix == ".gz"
    if packed and not named:
        raise DataError(f"{path} is packed with gzip. Name it {path.name}.gz, or unpack it.")
    if named and not packed and path.stat().st_size:
        raise DataError(f"{path} must be packed with gzip, and is not. Take .gz off its name.")
    return gzip.open(path, "rb") if named else path.open("rb")


def read_text(path: Path, index: int) -> Row:
    """A plain text file as one row."""
    body = path.read_bytes().removeprefix(BOM)
    if not body.strip():
        return Row(index, 1, {}, "must hold text, and is empty")
    try:
        return Row(index, 1, {"text": body.decode("utf-8")})
    except UnicodeDecodeError as error:
        return Row(index, 1, {}, not_utf8(body, error))


def not_utf8(body: bytes, error: UnicodeDecodeError) -> str:
    """Why bytes are not UTF-8 text."""
    return f"must be UTF-8, and has byte 0x{body[error.start]:02x} at {error.start}"


def first_byte(path: Path) -> bytes:
    """The first byte of a text that is neither white space nor a byte-order mark."""
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1]


def read_lines(file: Iterable[bytes], index: int) -> Iterator[Row]:
    """Rows of JSON Lines; blank lines are skipped."""
    for number, raw in enumerate(file, 1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        if not line.strip():
            continue
        value, problem = parse(line)
        if problem:
            yield Row(index, number, {}, problem)
        else:
            yield as_row(index, number, value)


def parse(line: bytes) -> tuple[Any, str]:
    """The value of a line of JSON, or the reason why it cannot be read."""
    if b"\0" in line:
        return None, f"must be text, and has a NUL byte at {line.index(0)}"
    try:
        return json.loads(line.decode("utf-8")), ""
    except UnicodeDecodeError as error:
        return None, not_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return None, f"must be JSON: {error}"


def as_row(index: int, number: int, value: object) -> Row:
    """A parsed value as a row."""
    if isinstance(value, dict):
        return Row(index, number, value)
    return Row(index, number, {}, f"must be a JSON object, got {type(value).__name__}")


def read_array(path: Path, body: bytes, index: int) -> Iterator[Row]:
    """Rows of a JSON file that holds one list of objects."""
    value, problem = parse(body.removeprefix(BOM))
    if problem:
        raise DataError(f"{path} {problem}. Write it again as a list of objects, or JSON Lines.")
    for number, item in enumerate(value, 1):
        yield as_row(index, number, item)


def read_parquet(
    path: Path, index: int, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[Row]:
    """Rows of a Parquet file, a row group at a time; only the requested columns are read."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [c for c in columns if c not in names]
            if missing:
                raise DataError(
                    f"{path}: column {missing[0]!r} is missing; it has {', '.join(names)}. "
                    "Name yours under data.columns."
                )
            number = 0
            wanted = [*columns, *(c for c in optional if c in names)] if columns else names
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(index, number, values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} must be a whole Parquet file: {error}. Fetch or write it again."
        ) from error
