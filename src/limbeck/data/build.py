"""Turning rows into tokenised arrays: checked, cut into windows, and planned into rows."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Bool, Int32, Shaped

from limbeck.config import DataConfig
from limbeck.data.detect import WEIGHT, advice, wanted_columns
from limbeck.data.formats import Encoder, Piece, Reader, Values
from limbeck.data.packing import cut, pack
from limbeck.data.rows import Row, Source
from limbeck.errors import DataError

SHOWN = 5
"""Bad rows an error or a note lists."""
CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 21

MOST_WEIGHT = 1e6

TOO_SHORT = "less than two tokens"
UNSCORED = "nothing to predict"
UNSCORED_WINDOW = "windows with nothing to predict"

Arrays = dict[str, Shaped[np.ndarray, "..."]]
"""The arrays of `TextData` by name."""

Progress = Callable[[int], None]
"""Called with the number of rows read so far."""


class BadRow(NamedTuple):
    """A bad row: index of its file, its line, and what is wrong."""

    file: int
    line: int
    problem: str


@dataclass
class Draft:
    """What has been read so far."""

    tokens: list[Int32[np.ndarray, " n"]] = field(default_factory=list)
    scored: list[Bool[np.ndarray, " n"]] = field(default_factory=list)
    num_tokens: int = 0
    windows: list[tuple[int, int, int]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    num_scored: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    bad_rows: list[BadRow] = field(default_factory=list)
    num_bad: int = 0


def build(
    config: DataConfig, source: Source, reader: Reader, encoder: Encoder, progress: Progress
) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and facts of a data set."""
    draft = Draft()
    for rows in chunks(rows_of(config, source, reader), config.max_documents):
        good = [
            (row, values)
            for row in rows
            if (values := checked(draft, row, config, reader)) is not None
        ]
        if not draft.num_bad or config.bad_rows == "skip":
            for (row, values), piece in zip(
                good, reader.encode([values for _, values in good], encoder), strict=True
            ):
                add(draft, row, values, piece, config.sequence_length)
        progress(len(draft.places) + draft.num_bad)
    refuse(draft, config, source)
    built = arrays(draft, config)
    return built, facts(draft, config, source, len(built["row_ends"]))


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
    columns = needed | {n: c for n, c in optional.items() if row.values.get(c) is not None}
    values = {name: row.values[column] for name, column in columns.items()}
    defect = reader.problem(values) or weight_problem(values, columns.get(WEIGHT, WEIGHT))
    if defect is not None:
        note_bad_row(draft, row, defect)
        return None
    return values


def weight_problem(values: Values, column: str = WEIGHT) -> str | None:
    """Why a row's weight, from a column of the file, is invalid; None when valid or absent.

    Example:
        >>> weight_problem({"weight": -1})
        "column 'weight' must be a number from 0 to 1,000,000, got -1"
    """
    weight = values.get(WEIGHT, 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number and 0 <= weight <= MOST_WEIGHT:
        return None
    return f"column {column!r} must be a number from 0 to 1,000,000, got {str(weight)[:40]}"


def note_bad_row(draft: Draft, row: Row, problem: str) -> None:
    """Count a bad row, and keep the first ones for the message."""
    draft.num_bad += 1
    if len(draft.bad_rows) < SHOWN:
        draft.bad_rows.append(BadRow(row.file, row.number, problem))


def named(draft: Draft, files: Sequence[str]) -> list[str]:
    """The first bad rows, each as `file:line: what is wrong`."""
    return [f"{files[file]}:{line}: {problem}" for file, line, problem in draft.bad_rows]


def add(draft: Draft, row: Row, values: Values, piece: Piece | str, length: int) -> None:
    """Add a tokenised row: its tokens, its windows, and what is dropped of it."""
    if isinstance(piece, str):
        note_bad_row(draft, row, piece)
        return
    document = len(draft.places)
    content = {name: value for name, value in values.items() if name != WEIGHT}
    body = json.dumps(content, sort_keys=True, default=str)
    draft.hashes.append(xxhash.xxh3_64_intdigest(body.encode()))
    draft.places.append((row.file, row.number))
    draft.weights.append(float(values.get(WEIGHT, 1.0)))
    draft.num_scored.append(int(piece.scored.sum()))
    if not piece.scored.any():
        draft.sizes.append(0)
        draft.ends.append(draft.num_tokens)
        draft.dropped[TOO_SHORT if len(piece.ids) < 2 else UNSCORED] += 1
        return
    draft.sizes.append(piece.num_bytes)
    for start, positions in cut(len(piece.ids), length):
        if piece.scored[start + 1 : start + positions + 1].any():
            draft.windows.append((draft.num_tokens + start, positions, document))
        else:
            draft.dropped[UNSCORED_WINDOW] += 1
    draft.tokens.append(piece.ids)
    draft.scored.append(piece.scored)
    draft.num_tokens += len(piece.ids)
    draft.ends.append(draft.num_tokens)


def refuse_rows(draft: Draft, config: DataConfig, source: Source) -> None:
    """Refuse a text with bad rows that are not skipped, or without any rows."""
    path = config.path
    if draft.num_bad and (config.bad_rows == "error" or not draft.places):
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
    if not draft.places:
        raise DataError(f"{path} must hold rows, and has none. Check the path and the split.")


def refuse(draft: Draft, config: DataConfig, source: Source) -> None:
    """Refuse a text with bad rows that are not skipped, or without usable rows."""
    refuse_rows(draft, config, source)
    path = config.path
    if not any(draft.weights):
        raise DataError(f"{path} must have a row whose weight is above 0, and all are 0.")
    if not draft.windows:
        skipped = [("bad rows skipped", draft.num_bad)] if draft.num_bad else []
        num_read = len(draft.places) + draft.num_bad
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


def arrays(draft: Draft, config: DataConfig) -> Arrays:
    """The arrays of `TextData`."""
    windows = np.array(draft.windows, dtype=np.int64)
    lengths = windows[:, 1]
    one_each = [[window] for window in range(len(windows))]
    plan = pack(lengths, config.sequence_length) if config.pack else one_each
    return {
        "tokens": np.concatenate(draft.tokens),
        "scored": np.concatenate(draft.scored),
        "windows": windows,
        "row_windows": np.array([w for row in plan for w in row], dtype=np.int64),
        "row_ends": np.cumsum([len(row) for row in plan], dtype=np.int64),
        "document_hashes": np.array(draft.hashes, dtype=np.uint64),
        "document_bytes": np.array(draft.sizes, dtype=np.int64),
        "document_scored": np.array(draft.num_scored, dtype=np.int64),
        "document_ends": np.array(draft.ends, dtype=np.int64),
        "document_places": np.array(draft.places, dtype=np.int64),
        "document_weights": np.array(
            draft.weights if WEIGHT in config.columns else [], dtype=np.float32
        ),
    }


def facts(draft: Draft, config: DataConfig, source: Source, num_rows: int) -> dict[str, Any]:
    """Counts of what was read and what was dropped."""
    num_positions = sum(length for _, length, _ in draft.windows)
    return {
        "bad_rows": {"skipped": draft.num_bad, "first": named(draft, source.names)},
        "documents": len(draft.places),
        "documents_used": len({document for *_, document in draft.windows}),
        "duplicates": len(draft.hashes) - len(set(draft.hashes)),
        "dropped": dict(draft.dropped),
        "windows": len(draft.windows),
        "positions": num_positions,
        "scored": sum(draft.num_scored),
        "largest_token_id": max(int(ids.max()) for ids in draft.tokens),
        "sequence_length": config.sequence_length,
        "rows": num_rows,
        "packing_efficiency": num_positions / (num_rows * config.sequence_length),
    }


def save(folder: Path, built: Arrays, names: Sequence[str]) -> None:
    """Write arrays as .npy files."""
    for name in names:
        np.save(folder / f"{name}.npy", built[name], allow_pickle=False)
