"""Turning rows into tokenised arrays: checked, cut into windows, and planned into rows."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Shaped

from limbeck.config import DataConfig
from limbeck.data.columns import Column, Kinds, columns
from limbeck.data.detect import SOURCE, WEIGHT, added_columns, advice, wanted_columns
from limbeck.data.formats import Encoder, Piece, Reader, Values, text_problem
from limbeck.data.packing import cut, pack
from limbeck.data.rows import Row, Source
from limbeck.data.workers import in_order
from limbeck.errors import DataError

SHOWN = 5
"""Bad rows an error or a note lists."""
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 21

MOST_WEIGHT = 1e6
MOST_SOURCES = 1000

TOO_SHORT = "less than two tokens"
UNSCORED = "nothing to predict"
UNSCORED_WINDOW = "windows with nothing to predict"

KINDS: Kinds = {
    "tokens": (np.int32, 0),
    "scored": (np.bool_, 0),
    "windows": (np.int64, 3),
    "document_hashes": (np.uint64, 0),
    "document_bytes": (np.int64, 0),
    "document_scored": (np.int64, 0),
    "document_ends": (np.int64, 0),
    "document_places": (np.int64, 2),
    "document_weights": (np.float32, 0),
    "document_sources": (np.int32, 0),
}
"""The arrays of `TextData` that grow while a text is read."""

Chunk = tuple[list[Row], bool]
"""Rows, and whether they are tokenised or checked only."""

Progress = Callable[[int, int], None]
"""Called with the numbers of rows and tokens read so far."""


class BadRow(NamedTuple):
    """A bad row: index of its file, its line, and what is wrong."""

    file: int
    line: int
    problem: str


@dataclass
class Draft:
    """Counts of what has been read, and its arrays until they are written.

    Attributes:
        arrays: With places that count from the draft's first token and first document.
        sources: Names in the column of sources, in the order of the text, and their numbers.
        tokenised: False for rows of a text that is already refused.
    """

    arrays: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in KINDS})
    tokenised: bool = True
    num_tokens: int = 0
    num_documents: int = 0
    num_used: int = 0
    num_windows: int = 0
    num_positions: int = 0
    num_scored: int = 0
    largest_id: int = 0
    has_weight: bool = False
    sources: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    num_bad: int = 0

    def append(self, later: Draft, to: Mapping[str, Column]) -> None:
        """Add counts of what was read next, and write its arrays."""
        arrays = {name: joined(name, values) for name, values in later.arrays.items()}
        arrays["windows"] += (self.num_tokens, 0, self.num_documents)
        arrays["document_ends"] += self.num_tokens
        numbers = [self.number_of(source) for source in later.sources]
        arrays["document_sources"] = np.array(numbers, np.int32)[arrays["document_sources"]]
        for name, values in arrays.items():
            to[name].extend(values)
        self.num_tokens += later.num_tokens
        self.num_documents += later.num_documents
        self.num_used += later.num_used
        self.num_windows += later.num_windows
        self.num_positions += later.num_positions
        self.num_scored += later.num_scored
        self.num_bad += later.num_bad
        self.largest_id = max(self.largest_id, later.largest_id)
        self.has_weight |= later.has_weight
        self.dropped += later.dropped
        self.bad_rows = (self.bad_rows + later.bad_rows)[:SHOWN]

    def number_of(self, source: str) -> int:
        """The number of a source, the next one where it is new."""
        return self.sources.setdefault(source, len(self.sources))


def build(
    config: DataConfig,
    source: Source,
    reader: Reader,
    encoder: Encoder,
    progress: Progress,
    folder: Path,
) -> dict[str, Any]:
    """Write the arrays of a data set into a folder; its facts.

    Tokens are written as they come: memory holds a chunk of rows a process, and when rows are
    planned 60 bytes a window. The arrays do not depend on the number of processes.
    """
    draft = Draft()
    refused = False

    def read() -> Iterator[Chunk]:
        for rows in chunks(rows_of(config, source, reader), config.max_documents):
            yield rows, not refused

    def name(chunk: Chunk) -> str:
        (first, *_), (last, *_) = chunk[0], reversed(chunk[0])
        files = source.labels
        return f"{files[first.file]}:{first.number} to {files[last.file]}:{last.number}"

    work = partial(tokenise, config, reader, encoder)
    with columns(folder, KINDS) as files, closing(in_order(work, read(), name)) as parts:
        for part in parts:
            if refused and part.tokenised:
                continue  # sent to a process before the first bad row was known
            draft.append(part, files)
            refused = draft.num_bad > 0 and config.bad_rows == "error"
            refuse_many_sources(draft, config)
            progress(draft.num_documents + draft.num_bad, draft.num_tokens)
    refuse(draft, config, source)
    num_rows = plan_rows(folder, config)
    return facts(draft, config, source, folder, num_rows)


def tokenise(config: DataConfig, reader: Reader, encoder: Encoder, chunk: Chunk) -> Draft:
    """A chunk's draft."""
    rows, wanted = chunk
    draft = Draft()
    good = [
        (row, values) for row in rows if (values := checked(draft, row, config, reader)) is not None
    ]
    draft.tokenised = wanted and (not draft.num_bad or config.bad_rows == "skip")
    if draft.tokenised:
        encoded = reader.encode([values for _, values in good], encoder)
        for (row, values), piece in zip(good, encoded, strict=True):
            add(draft, row, values, piece, config.sequence_length, added_columns(config, reader))
    return draft


def joined(name: str, values: list[Any]) -> Shaped[np.ndarray, " ..."]:
    """An array of a draft."""
    dtype, width = KINDS[name]
    whole = name in ("tokens", "scored") and values
    array = np.concatenate(values, dtype=dtype) if whole else np.array(values, dtype)
    return array.reshape((-1, width) if width else -1)


def plan_rows(folder: Path, config: DataConfig) -> int:
    """Write which windows make up each row; the number of rows."""
    lengths = np.load(folder / "windows.npy", mmap_mode="r")[:, 1]
    if config.pack:
        windows, ends = pack(lengths, config.sequence_length)
    else:
        windows = np.arange(len(lengths), dtype=np.int64)
        ends = windows + 1
    np.save(folder / "row_windows.npy", windows)
    np.save(folder / "row_ends.npy", ends)
    return len(ends)


def rows_of(config: DataConfig, source: Source, reader: Reader) -> Iterator[Row]:
    """Rows with the columns that a type reads."""
    needed, optional = wanted_columns(config, reader)
    return source.rows(tuple(needed.values()), tuple(optional.values()))


def chunks(rows: Iterator[Row], most: int | None) -> Iterator[list[Row]]:
    """The first rows, in lists that are tokenised at once."""
    chunk: list[Row] = []
    size = 0
    for row in itertools.islice(rows, most):
        chunk.append(row)
        size += sum(len(v) if isinstance(v, str) else 1000 for v in row.values.values())
        if len(chunk) == CHUNK_ROWS or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def checked(draft: Draft, row: Row, config: DataConfig, reader: Reader) -> Values | None:
    """A row's columns under the names of its type; None for a bad row, which is counted."""
    needed, optional = wanted_columns(config, reader)
    problem = row.problem
    if not problem:
        missing = [name for name in needed.values() if name not in row.values]
        if missing:
            has = ", ".join(map(repr, row.values)) or "none"
            problem = f"column {missing[0]!r} is missing; the row has {has}{advice(row.values)}"
    if problem:
        note_bad_row(draft, row, problem)
        return None
    present = needed | {n: c for n, c in optional.items() if row.values.get(c) is not None}
    values = {name: row.values[column] for name, column in present.items()}
    defect = reader.problem(values)
    for name, column in added_columns(config, reader).items():
        problem_of = weight_problem if name == WEIGHT else text_problem
        defect = defect or problem_of(values[name], f"column {column!r}")
    if defect is not None:
        note_bad_row(draft, row, defect)
        return None
    return values


def weight_problem(weight: Any, name: str) -> str | None:
    """Why a row's weight is invalid; None when it is valid.

    Example:
        >>> weight_problem(-1, "column 'weight'")
        "column 'weight' must be a number from 0 to 1,000,000, got -1"
    """
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number and 0 <= weight <= MOST_WEIGHT:
        return None
    return f"{name} must be a number from 0 to 1,000,000, got {str(weight)[:40]}"


def note_bad_row(draft: Draft, row: Row, problem: str) -> None:
    """Count a bad row, and keep the first ones for the message."""
    draft.num_bad += 1
    if len(draft.bad_rows) < SHOWN:
        draft.bad_rows.append(BadRow(row.file, row.number, problem))


def named(draft: Draft, files: Sequence[str]) -> list[str]:
    """The first bad rows, each as `file:line: what is wrong`."""
    return [f"{files[file]}:{line}: {problem}" for file, line, problem in draft.bad_rows]


def add(
    draft: Draft,
    row: Row,
    values: Values,
    piece: Piece | str,
    sequence_length: int,
    added: Collection[str],
) -> None:
    """Add a tokenised row: its tokens, its windows, and what is dropped of it.

    Args:
        added: Columns among its values that are not its content.
    """
    if isinstance(piece, str):
        note_bad_row(draft, row, piece)
        return
    content = {name: value for name, value in values.items() if name not in added}
    body = json.dumps(content, sort_keys=True, default=str)
    weight = float(values[WEIGHT]) if WEIGHT in added else 1.0
    num_scored = int(piece.scored.sum())
    new, windows = draft.arrays, 0
    if num_scored:
        for start, positions in cut(len(piece.ids), sequence_length):
            if piece.scored[start + 1 : start + positions + 1].any():
                place = (draft.num_tokens + start, positions, draft.num_documents)
                new["windows"].append(place)
                windows += 1
                draft.num_positions += positions
            else:
                draft.dropped[UNSCORED_WINDOW] += 1
        new["tokens"].append(piece.ids)
        new["scored"].append(piece.scored)
        draft.num_tokens += len(piece.ids)
        draft.largest_id = max(draft.largest_id, int(piece.ids.max()))
    else:
        draft.dropped[TOO_SHORT if len(piece.ids) < 2 else UNSCORED] += 1
    new["document_hashes"].append(xxhash.xxh3_64_intdigest(body.encode()))
    new["document_bytes"].append(piece.num_bytes if num_scored else 0)
    new["document_scored"].append(num_scored)
    new["document_ends"].append(draft.num_tokens)
    new["document_places"].append((row.file, row.number))
    if WEIGHT in added:
        new["document_weights"].append(weight)
    if SOURCE in added:
        new["document_sources"].append(draft.number_of(values[SOURCE]))
    draft.num_documents += 1
    draft.num_used += windows > 0
    draft.num_windows += windows
    draft.num_scored += num_scored
    draft.has_weight |= weight > 0


def refuse_rows(draft: Draft, config: DataConfig, source: Source) -> None:
    """Refuse a text with bad rows that are not skipped, or without any rows."""
    path = config.path
    if draft.num_bad and (config.bad_rows == "error" or not draft.num_documents):
        count = "1 is not" if draft.num_bad == 1 else f"{draft.num_bad:,} are not"
        first = f", the first {SHOWN}" if draft.num_bad > SHOWN else ""
        remedy = "Correct or remove them. Set data.columns where columns have other names."
        if config.bad_rows == "error":
            remedy = f"{remedy[:-1]}, or data.bad_rows: skip to train on the others."
        raise DataError(
            "\n".join(
                [
                    f"Every row of {path} must be readable; {count}{first}:",
                    *(f"  {line}" for line in named(draft, source.labels)),
                    remedy,
                ]
            )
        )
    if not draft.num_documents:
        raise DataError(f"{path} must hold rows, and has none. Check the path and the split.")


def refuse(draft: Draft, config: DataConfig, source: Source) -> None:
    """Refuse a text with bad rows that are not skipped, or without usable rows."""
    refuse_rows(draft, config, source)
    path = config.path
    if not draft.has_weight:
        raise DataError(f"{path} must have a row whose weight is above 0, and all are 0.")
    if not draft.num_windows:
        skipped = [("bad rows skipped", draft.num_bad)] if draft.num_bad else []
        num_read = draft.num_documents + draft.num_bad
        table = [("rows read", num_read), *skipped, *draft.dropped.items(), ("rows left", 0)]
        raise DataError(
            "\n".join(
                [
                    f"{path} must have a token to train on, and all of its rows were dropped:",
                    *(f"  {count:>8,}  {why}" for why, count in table),
                    "Give longer texts, or chats with assistant messages.",
                ]
            )
        )


def refuse_many_sources(draft: Draft, config: DataConfig) -> None:
    """Refuse a column of sources that is none, such as one of texts or of addresses."""
    if len(draft.sources) > MOST_SOURCES:
        raise DataError(
            f"data.columns.source: a text must have at most {MOST_SOURCES:,} different sources, "
            f"and column {config.columns[SOURCE]!r} of {config.path} has more. Name a column of "
            "few values, such as a domain."
        )


def facts(
    draft: Draft, config: DataConfig, source: Source, folder: Path, num_rows: int
) -> dict[str, Any]:
    """Counts of what was read and what was dropped."""
    return {
        "bad_rows": {"skipped": draft.num_bad, "first": named(draft, source.names)},
        "documents": draft.num_documents,
        "documents_used": draft.num_used,
        "duplicates": num_repeated(folder),
        "dropped": dict(draft.dropped),
        "document_sources": list(draft.sources),
        "windows": draft.num_windows,
        "positions": draft.num_positions,
        "scored": draft.num_scored,
        "largest_token_id": draft.largest_id,
        "sequence_length": config.sequence_length,
        "rows": num_rows,
        "packing_efficiency": draft.num_positions / (num_rows * config.sequence_length),
    }


def num_repeated(folder: Path) -> int:
    """Documents that repeat an earlier one."""
    hashes = np.load(folder / "document_hashes.npy", mmap_mode="r")
    return len(hashes) - len(np.unique(hashes))
