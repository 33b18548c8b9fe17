"""Stores from what other tools recorded: DistillKit's raw rows, vLLM's prompt log-probabilities.

Each row is one sample: what the teacher said about a text read from its beginning. A file becomes a
shard. What such files do not say is the tail's mass at any other temperature, so a store made here
serves one temperature.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Bool, Float32, Int32, Int64

from limbeck.errors import ConfigError, DataError
from limbeck.signals import FLOOR, TopK
from limbeck.store.header import StoreHeader
from limbeck.store.sample import Sample
from limbeck.store.writer import ShardWriter

BATCH_ROWS = 16
MOST_LINE_BYTES = 1 << 30
TOLERANCE = 1e-3
"""How far above 1 the probabilities of a row may add up, from rounding in the file."""


@dataclass(frozen=True)
class Row:
    """What a file says of one text.

    Attributes:
        tokens: All T of them.
        ids: Token ids at each of the first T - 1 positions, which predict the next token.
        logprobs: Their log-probabilities.
        scored: Which of those positions count.
    """

    tokens: Int32[np.ndarray, " T"]
    ids: Int64[np.ndarray, "L k"]
    logprobs: Float32[np.ndarray, "L k"]
    scored: Bool[np.ndarray, " L"]


def import_store(source: Path, folder: Path, header: StoreHeader) -> StoreHeader:
    """Make a store of a file, or of a folder's files in the order of their names.

    Args:
        source: `.parquet` with columns `input_ids`, `token_ids` and `top_values` (DistillKit's raw
            rows), and `labels` if not everything is scored; or `.jsonl` with `prompt_token_ids`
            and `prompt_logprobs` (vLLM).
        folder: The store to make.
        header: With the form `top_k`; its number of shards is set to the number of files.

    Returns:
        The store's header.

    Raises:
        ConfigError: The form is not `top_k` at one temperature.
        DataError: A file cannot be read or does not say what it must; file and row are named.
    """
    form = header.form
    if form["type"] != "top_k" or len(form.get("temperatures", (1.0,))) != 1:
        raise ConfigError(
            f"An imported store must have the form top_k at one temperature, got {dict(form)}. "
            "Other files do not say more; record the teacher for anything else."
        )
    files = files_of(source)
    facts = {**header.to_json(), "num_shards": len(files), "layers": header.layers}
    header = StoreHeader(**facts)
    temperature = float(form.get("temperatures", (1.0,))[0])
    for shard, file in enumerate(files):
        read = READERS[file.suffix]
        with ShardWriter(folder, shard, header) as writer:
            for number, row in enumerate(read(file, int(form.get("k", 32)))):
                place = f"{file}, row {number}"
                try:
                    writer.add(*as_sample(row, header, temperature))
                except DataError as error:
                    raise DataError(f"{place}: {error}") from error
    return header


def files_of(source: Path) -> list[Path]:
    """The files a store is to be made of.

    Raises:
        DataError: There is none.
    """
    found = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [file for file in found if file.suffix in READERS and file.is_file()]
    if not files:
        raise DataError(
            f"{source} must be, or hold, files ending in {' or '.join(READERS)}, and does not. "
            "Name what the other tool wrote."
        )
    return files


def as_sample(row: Row, header: StoreHeader, temperature: float) -> tuple[Sample, TopK]:
    """A row as the store holds it.

    Raises:
        DataError: Ids are not different tokens of the vocabulary, or the probabilities are none.
    """
    ids, logprobs = row.ids[row.scored], row.logprobs[row.scored]
    if ids.size and not (ids.min() >= 0 and ids.max() < header.vocabulary_size):
        raise DataError(
            f"token ids must be from 0 to {header.vocabulary_size - 1:,}, got {ids.min():,} to "
            f"{ids.max():,}. Give the vocabulary size of the teacher that was recorded"
        )
    ordered = np.sort(ids, axis=-1)
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise DataError("a position names a token twice. Record these rows again")
    mass = np.exp(logprobs.astype(np.float64)).sum(-1)
    if not bool((mass <= 1 + TOLERANCE).all()):
        raise DataError(
            f"the probabilities of a position must add up to at most 1, got {mass.max():.4g}. "
            "Are these logits? Log-probabilities under the whole vocabulary are needed"
        )
    tail = np.log(np.maximum(1 - mass, np.exp(-30.0)))
    signal = TopK(
        torch.from_numpy(ids),
        torch.from_numpy(np.maximum(logprobs, FLOOR)),
        torch.from_numpy(tail.astype(np.float32)),
        temperature,
    )
    return Sample(row.tokens, row.scored), signal


def read_parquet(path: Path, k: int) -> Iterator[Row]:
    """Rows of `input_ids` [T], `token_ids` and `top_values` [T or T - 1, at least k].

    Raises:
        DataError: It is no such file.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if "compressed_logprobs" in names:
            raise DataError(
                f"{path} holds DistillKit's compressed rows, whose codec is set elsewhere. "
                "Decompress them with the tool that wrote them, to token_ids and top_values."
            )
        if missing := {"input_ids", "token_ids", "top_values"} - names:
            raise DataError(
                f"{path} must have the columns input_ids, token_ids and top_values, and lacks "
                f"{', '.join(sorted(missing))}. Rename its columns."
            )
        columns = [*("input_ids", "token_ids", "top_values"), *names.intersection({"labels"})]
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for told in batch.to_pylist():
                yield row_of(told["input_ids"], told["token_ids"], told["top_values"], k, told)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a Parquet file, but cannot be read: {error}.") from error


def read_jsonl(path: Path, k: int) -> Iterator[Row]:
    """Lines of `prompt_token_ids` [T] and `prompt_logprobs`, vLLM's list of T.

    Its first is null. Entry i is the distribution *of* token i; beside the most probable tokens it
    holds that token itself, which may be one too many.

    Raises:
        DataError: A line says something else.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                told = json.loads(line)
                pairs = [most_probable(entry, k) for entry in told["prompt_logprobs"][1:]]
                ids = [[each[0] for each in pair] for pair in pairs]
                logprobs = [[each[1] for each in pair] for pair in pairs]
                yield row_of(told["prompt_token_ids"], ids, logprobs, k, told)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{path}:{number} must be an object with prompt_token_ids and vLLM's "
                    f"prompt_logprobs, and is not: {type(error).__name__} {error}."
                ) from error


def most_probable(entry: Mapping[str, Any], k: int) -> list[tuple[int, float]]:
    """The k most probable tokens of one position; vLLM gives `{id: {logprob, ...}}`."""
    pairs = [
        (int(token), float(told["logprob"] if isinstance(told, Mapping) else told))
        for token, told in entry.items()
    ]
    return sorted(pairs, key=lambda pair: -pair[1])[:k]


def row_of(tokens: Any, ids: Any, logprobs: Any, k: int, told: Mapping[str, Any]) -> Row:
    """A row, with its lengths checked.

    Raises:
        DataError: They do not go together, or a position has fewer than k tokens.
    """
    length = len(tokens) - 1
    if length < 1 or not len(ids) == len(logprobs) or len(ids) not in (length, length + 1):
        raise DataError(
            f"A row of {length + 1} tokens must have top tokens at {length} positions (or one "
            f"more, which predicts what is not there), got {len(ids)} and {len(logprobs)}."
        )
    fewest = min((min(len(a), len(b)) for a, b in zip(ids, logprobs, strict=True)), default=0)
    if fewest < k:
        raise DataError(
            f"form.k is {k}, and a position has {fewest} tokens. Set form.k to {fewest} or less."
        )
    values = np.array([each[:k] for each in logprobs[:length]], dtype=np.float32)
    if bool(np.isnan(values).any()) or bool((values > TOLERANCE).any()):
        raise DataError("Log-probabilities must be numbers of at most 0, and some are not.")
    labels = told.get("labels")
    scored = np.ones(length, dtype=np.bool_)
    if labels is not None:
        scored = np.array(labels[1:]) != -100
    return Row(
        np.array(tokens, dtype=np.int32),
        np.array([each[:k] for each in ids[:length]], dtype=np.int64),
        values,
        scored,
    )


READERS: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
}
