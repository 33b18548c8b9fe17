"""Import of signals that other tools recorded: DistillKit's raw rows, vLLM's prompt_logprobs.

Each row is one sample, a text from its first token; each file becomes a shard. Such files do not
hold the tail at other temperatures, so an imported store serves one temperature.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Float32, Int64

from limbeck.errors import ConfigError, DataError
from limbeck.files import sha256, staging
from limbeck.losses.distributions import FLOOR, TopK
from limbeck.store.header import StoreHeader
from limbeck.store.sample import Sample
from limbeck.store.writer import ShardWriter, storing

BATCH_ROWS = 16
MAX_LINE_BYTES = 1 << 30
TOLERANCE = 1e-3
"""Tolerated excess over 1 of the sum of a row's probabilities, from rounding in the file."""


class UncheckedRow(NamedTuple):
    """One row of a file, as parsed.

    Attributes:
        location: File, and row or line.
        ids: Top token ids at the first L = T - 1 positions, which predict the next token; one
            position more has no target.
        logprobs: Their log-probabilities.
        labels: -100 for tokens that are not scored; None if all are.
    """

    location: str
    tokens: Any
    ids: Any
    logprobs: Any
    labels: Any


def import_store(
    source: Path,
    folder: Path,
    header: StoreHeader,
    complete: Callable[[Path], None] = lambda _: None,
) -> StoreHeader:
    """Make a store from a file, or from the files of a folder in the order of their names.

    The store appears complete or not at all.

    Args:
        source: `.parquet` with columns `input_ids`, `token_ids` and `top_values` (DistillKit's raw
            rows), and `labels` if not everything is scored; or `.jsonl` with `prompt_token_ids`
            and `prompt_logprobs` (vLLM).
        header: With the form `top_k`; its number of shards is set to the number of files, and its
            data to a hash of them.
        complete: Called with the store's temporary folder before it is renamed, to add files.

    Returns:
        The store's header.

    Raises:
        ConfigError: The form is not `top_k` at one temperature, or the folder holds something.
        DataError: A file cannot be read, or a row is invalid; file and row are named.
        StorageError: The disk is full, or may not be written.
    """
    form = header.form
    if form["type"] != "top_k" or len(form.get("temperatures", (1.0,))) != 1:
        raise ConfigError(
            f"An imported store must have the form top_k at one temperature, got {dict(form)}. "
            "The files hold nothing else; record the teacher for another form."
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"An imported store needs a new folder, and {folder} is there and holds something. "
            "Choose another."
        )
    files = files_of(source)
    hashes = " ".join(sha256(file) for file in files)
    facts = {**header.to_json(), "num_shards": len(files), "layers": header.layers}
    header = StoreHeader(**facts | {"data": hashlib.sha256(hashes.encode()).hexdigest()})
    temporary = staging(folder)
    try:
        for shard, file in enumerate(files):
            import_file(file, temporary, shard, header)
        complete(temporary)
        with storing(folder, temporary):
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return header


def import_file(file: Path, folder: Path, shard: int, header: StoreHeader) -> None:
    """Make a shard from a file."""
    k = int(header.form.get("k", 32))
    temperature = float(header.form.get("temperatures", (1.0,))[0])
    with ShardWriter(folder, shard, header) as writer:
        for row in READERS[file.suffix](file, k):
            try:
                sample, ids, logprobs = validated(row, k)
                writer.add(sample, as_signal(ids, logprobs, header, temperature))
            except DataError as error:
                raise DataError(f"{row.location}: {error}") from error


def files_of(source: Path) -> list[Path]:
    """The files to import."""
    candidates = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [file for file in candidates if file.suffix in READERS and file.is_file()]
    if not files:
        raise DataError(
            f"{source} must be, or hold, files ending in {' or '.join(READERS)}, and does not. "
            "Name what the other tool wrote."
        )
    return files


def as_signal(
    ids: Int64[np.ndarray, "N k"],
    logprobs: Float32[np.ndarray, "N k"],
    header: StoreHeader,
    temperature: float,
) -> TopK:
    """The signal of a sample, from the top tokens at its scored positions."""
    if ids.size and not (ids.min() >= 0 and ids.max() < header.vocabulary_size):
        raise DataError(
            f"token ids must be from 0 to {header.vocabulary_size - 1:,}, got {ids.min():,} to "
            f"{ids.max():,}. Give the vocabulary size of the teacher that was recorded"
        )
    ordered = np.sort(ids, axis=-1)
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise DataError("a position names a token twice. Record these rows again")
    total = np.exp(logprobs.astype(np.float64)).sum(-1)
    if not bool((total <= 1 + TOLERANCE).all()):
        raise DataError(
            f"the probabilities of a position must add up to at most 1, got {total.max():.4g}. "
            "Are these logits? Log-probabilities under the whole vocabulary are needed"
        )
    tail = np.log(np.maximum(1 - total, np.exp(-30.0)))
    return TopK(
        torch.from_numpy(ids),
        torch.from_numpy(np.maximum(logprobs, FLOOR)),
        torch.from_numpy(tail.astype(np.float32)),
        temperature,
    )


def read_parquet(path: Path, k: int) -> Iterator[UncheckedRow]:
    """Rows of `input_ids` [T], `token_ids` and `top_values` [T or T - 1, at least k]."""
    del k
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
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                parts = (row["input_ids"], row["token_ids"], row["top_values"])
                yield UncheckedRow(f"{path}, row {number}", *parts, row.get("labels"))
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a Parquet file, but cannot be read: {error}.") from error


def read_jsonl(path: Path, k: int) -> Iterator[UncheckedRow]:
    """Lines of `prompt_token_ids` [T] and `prompt_logprobs`, vLLM's list of T.

    The first entry is null. Entry i is the distribution of token i itself; it holds the most
    probable tokens, and token i if that is not among them.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                pairs = [most_probable(entry, k) for entry in row["prompt_logprobs"][1:]]
                ids = [[each[0] for each in pair] for pair in pairs]
                logprobs = [[each[1] for each in pair] for pair in pairs]
                tokens, labels = row["prompt_token_ids"], row.get("labels")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number} must be an object with prompt_token_ids and vLLM's "
                    f"prompt_logprobs, and is not: {type(error).__name__} {error}."
                ) from error
            yield UncheckedRow(f"{path}:{number}", tokens, ids, logprobs, labels)


def most_probable(entry: Mapping[str, Any], k: int) -> list[tuple[int, float]]:
    """The k most probable tokens of one position; vLLM gives `{id: {logprob, ...}}`."""
    pairs = [
        (int(token), float(value["logprob"] if isinstance(value, Mapping) else value))
        for token, value in entry.items()
    ]
    return sorted(pairs, key=lambda pair: -pair[1])[:k]


def validated(
    row: UncheckedRow, k: int
) -> tuple[Sample, Int64[np.ndarray, "N k"], Float32[np.ndarray, "N k"]]:
    """A row's sample, and the ids and log-probabilities at its scored positions."""
    try:
        length = len(row.tokens) - 1
        counts = len(row.ids), len(row.logprobs)
        widths = [min(len(a), len(b)) for a, b in zip(row.ids, row.logprobs, strict=False)]
    except TypeError as error:
        raise DataError(f"tokens, ids and log-probabilities must be lists ({error})") from error
    if length < 1 or counts[0] != counts[1] or counts[0] not in (length, length + 1):
        raise DataError(
            f"a row of {length + 1} tokens must have top tokens at {length} positions (or one "
            f"more, which predicts what is not there), got {counts[0]} and {counts[1]}"
        )
    if (fewest := min(widths)) < k:
        raise DataError(
            f"form.k is {k}, and a position has {fewest} tokens. Set form.k to {fewest} or less"
        )
    try:
        values = np.array([each[:k] for each in row.logprobs[:length]], dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"log-probabilities must be numbers ({error})") from error
    if bool(np.isnan(values).any()) or bool((values > TOLERANCE).any()):
        raise DataError("log-probabilities must be numbers of at most 0, and some are not")
    scored = np.ones(length, dtype=np.bool_)
    if row.labels is not None:
        labels = whole_numbers(row.labels, "labels", (length + 1,))
        scored = labels[1:] != -100
    tokens = whole_numbers(row.tokens, "tokens", (length + 1,)).clip(-1, np.iinfo(np.int32).max)
    ids = whole_numbers([each[:k] for each in row.ids[:length]], "token ids", (length, k))
    return Sample(tokens.astype(np.int32), scored), ids[scored], values[scored]


def whole_numbers(values: Any, name: str, shape: tuple[int, ...]) -> Int64[np.ndarray, " ..."]:
    """Integers of this shape."""
    try:
        array = np.asarray(values)
    except ValueError:  # nested lists of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iu" or array.shape != shape:
        wanted = " x ".join(map(str, shape))
        raise DataError(f"{name} must be {wanted} whole numbers, and are not")
    return array.astype(np.int64)


READERS: dict[str, Callable[[Path, int], Iterator[UncheckedRow]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
}
