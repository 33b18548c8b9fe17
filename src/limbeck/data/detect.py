"""Which data type a file's rows have, from the columns of its first row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from limbeck.config import DataConfig
from limbeck.data.formats import Reader, reader_of, readers
from limbeck.data.rows import Source
from limbeck.errors import DataError

AUTO = "auto"
ORDER = ("chat", "sharegpt", "alpaca", "completion", "text")
"""Built-in types, the most specific first: a file of conversations often has a `text` as well."""

TRIED_ROWS = 100
"""Rows among which the first readable one is looked for."""

WEIGHT, SOURCE = "weight", "source"
"""Columns that any type reads where `data.columns` names them."""


def known_columns(reader: Reader) -> tuple[str, ...]:
    """Names that `data.columns` may have for a type."""
    return tuple(dict.fromkeys((*reader.columns, *reader.optional, WEIGHT, SOURCE)))


def added_columns(config: DataConfig, reader: Reader) -> dict[str, str]:
    """The weight and the source that `data.columns` names: our name, and the file's.

    A type may have a column of its own that is called so; it is then the type's alone.
    """
    own = (*reader.columns, *reader.optional)
    return {n: config.columns[n] for n in (WEIGHT, SOURCE) if n in config.columns and n not in own}


def wanted_columns(config: DataConfig, reader: Reader) -> tuple[dict[str, str], dict[str, str]]:
    """The columns a row must have and those it may have: our name, and the file's."""
    needed = {name: name for name in reader.columns}
    named = {n: c for n, c in config.columns.items() if n not in reader.optional}
    optional = {name: config.columns.get(name, name) for name in reader.optional}
    return needed | named, optional


def data_type(config: DataConfig, source: Source) -> str:
    """The configuration's data type; for `auto` the one whose columns the first row has."""
    if config.type != AUTO:
        return config.type
    rows = (row for row in islice(source.rows(), TRIED_ROWS) if not row.problem)
    row = next(rows, None)
    if row is None:
        return "text"  # its reader reports what is wrong with the rows, or that there are none
    filled = [name for name, value in row.values.items() if value is not None]
    for columns in (filled, row.values):
        if found := next(matching(columns, config.columns), None):
            return found
    has = ", ".join(map(repr, row.values)) or "none"
    known = "; ".join(f"{kind}: {', '.join(reader_of(kind).columns)}" for kind in candidates())
    raise DataError(
        f"{source.labels[row.file]}:{row.number}: the row must have the columns of a data type "
        f"({known}), and has {has}. Set data.type, and data.columns where columns have other names."
    )


def candidates() -> list[str]:
    """All types, in the order in which they are tried."""
    return [*ORDER, *(name for name in readers.names() if name not in ORDER)]


def matching(has: Collection[str], renamed: Mapping[str, str]) -> Iterator[str]:
    """Types that read some columns, after `data.columns`.

    Example:
        >>> list(matching(["text", "messages"], {}))
        ['chat', 'text']
        >>> list(matching(["body", "messages"], {"text": "body"}))
        ['text']
    """
    for kind in candidates():
        reader = reader_of(kind)
        needed = {renamed.get(name, name) for name in reader.columns}
        if needed <= set(has) and renamed.keys() <= set(known_columns(reader)):
            yield kind


def advice(has: Collection[str]) -> str:
    """How a message continues when a row has another type's columns; empty where none fits.

    Example:
        >>> advice(["messages"])
        '. Rows with messages are read with data.type: chat'
    """
    kind = next(matching(has, {}), None)
    if kind is None:
        return ""
    return f". Rows with {', '.join(reader_of(kind).columns)} are read with data.type: {kind}"
