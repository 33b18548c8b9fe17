"""Stores from what other tools recorded: DistillKit's raw rows, vLLM's prompt log-probabilities.

Each row is one sample: what the teacher said about a text read from its beginning. A file becomes a
shard. What such files do not say is the tail's mass at any other temperature, so a store made here
serves one temperature.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Bool, Float32, Int32, Int64

from limbeck.errors import ConfigError, DataError
from limbeck.files import sha256, staging
from limbeck.losses.distributions import FLOOR, TopK
from limbeck.store.header import StoreHeader
from limbeck.store.sample import Sample
from limbeck.store.writer import ShardWriter, storing

BATCH_ROWS = 16
MOST_LINE_BYTES = 1 << 30
TOLERANCE = 1e-3
"""How far above 1 the probabilities of a row may add up, from rounding in the file."""


class Told(NamedTuple):
    """What a file says of one text, unchecked.

    Attributes:
        place: File, and row or line.
        tokens: As `Row`.
        ids: As `Row`, or of one position more, whose target is not there.
        logprobs: Likewise.
        labels: -100 where a token does not count; None where all do.
    """

    place: str
    tokens: Any
    ids: Any
    logprobs: Any
    labels: Any


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


def import_store(
    source: Path,
    folder: Path,
    header: StoreHeader,
    complete: Callable[[Path], None] = lambda _: None,
) -> StoreHeader:
    """Make a store of a file, or of a folder's files in the order of their names; whole or not.

    Args:
        source: `.parquet` with columns `input_ids`, `token_ids` and `top_values` (DistillKit's raw
            rows), and `labels` if not everything is scored; or `.jsonl` with `prompt_token_ids`
            and `prompt_logprobs` (vLLM).
        folder: The store to make; new.
        header: With the form `top_k`; its number of shards is set to the number of files, and its
            data to a hash of them.
        complete: Adds to the store what else belongs into it, before it gets its name.

    Returns:
        The store's header.

    Raises:
        ConfigError: The form is not `top_k` at one temperature, or the folder holds something.
        DataError: A file cannot be read or does not say what it must; file and row are named.
        StorageError: The disk is full, or may not be written.
    """
    form = header.form
    if form["type"] != "top_k" or len(form.get("temperatures", (1.0,))) != 1:
        raise ConfigError(
            f"An imported store must have the form top_k at one temperature, got {dict(form)}. "
            "Other files do not say more; record the teacher for anything else."
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
    """Make a shard of a file.

    Raises:
        DataError: It does not say what it must; file and row are named.
    """
    k, temperature = (
        int(header.form.get("k", 32)),
        float(header.form.get("temperatures", (1.0,))[0]),
    )
    with ShardWriter(folder, shard, header) as writer:
        for told in READERS[file.suffix](file, k):
            try:
                writer.add(*as_sample(row_of(told, k), header, temperature))
            except DataError as error:
                raise DataError(f"{told.place}: {error}") from error


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


def read_parquet(path: Path, k: int) -> Iterator[Told]:
    """Rows of `input_ids` [T], `token_ids` and `top_values` [T or T - 1, at least k].

    Raises:
        DataError: It is no such file.
    """
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
                yield Told(f"{path}, row {number}", *parts, row.get("labels"))
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a Parquet file, but cannot be read: {error}.") from error


def read_jsonl(path: Path, k: int) -> Iterator[Told]:
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
            yield Told(f"{path}:{number}", tokens, ids, logprobs, labels)


def most_probable(entry: Mapping[str, Any], k: int) -> list[tuple[int, float]]:
    """The k most probable tokens of one position; vLLM gives `{id: {logprob, ...}}`."""
    pairs = [
        (int(token), float(told["logprob"] if isinstance(told, Mapping) else told))
        for token, told in entry.items()
    ]
    return sorted(pairs, key=lambda pair: -pair[1])[:k]


def row_of(told: Told, k: int) -> Row:
    """A row, checked.

    Raises:
        DataError: Its parts are no numbers, do not go together, or a position has fewer than k.
    """
    try:
        length = len(told.tokens) - 1
        counts = len(told.ids), len(told.logprobs)
        widths = [min(len(a), len(b)) for a, b in zip(told.ids, told.logprobs, strict=False)]
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
        values = np.array([each[:k] for each in told.logprobs[:length]], dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"log-probabilities must be numbers ({error})") from error
    if bool(np.isnan(values).any()) or bool((values > TOLERANCE).any()):
        raise DataError("log-probabilities must be numbers of at most 0, and some are not")
    scored = np.ones(length, dtype=np.bool_)
    if told.labels is not None:
        labels = whole_numbers(told.labels, "labels", (length + 1,))
        scored = labels[1:] != -100
    tokens = whole_numbers(told.tokens, "tokens", (length + 1,)).clip(-1, np.iinfo(np.int32).max)
    ids = whole_numbers([each[:k] for each in told.ids[:length]], "token ids", (length, k))
    return Row(tokens.astype(np.int32), ids, values, scored)


def whole_numbers(told: Any, name: str, shape: tuple[int, ...]) -> Int64[np.ndarray, ...]:
    """Numbers of a file, as they are.

    Raises:
        DataError: They are no whole numbers, or not so many.
    """
    try:
        found = np.asarray(told)
    except ValueError:  # lists of unlike lengths
        found = np.empty(0, dtype=object)
    if found.dtype.kind not in "iu" or found.shape != shape:
        wanted = " x ".join(map(str, shape))
        raise DataError(f"{name} must be {wanted} whole numbers, and are not")
    return found.astype(np.int64)


READERS: dict[str, Callable[[Path, int], Iterator[Told]]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
}
