"""`load_data`: from a configuration to tokenised text, through a cache on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from limbeck.config import DataConfig
from limbeck.data.build import Progress, build
from limbeck.data.detect import AUTO, candidates, data_type, known_columns
from limbeck.data.formats import Encoder, reader_of, readers
from limbeck.data.mixture import (
    identity_of,
    join,
    mixed_sources,
    mixture_problems,
    source_names,
)
from limbeck.data.rows import Source, open_source
from limbeck.data.source import sources
from limbeck.data.text_data import TextData
from limbeck.errors import ConfigError, StorageError
from limbeck.files import locked, manifest, publish, sweep
from limbeck.models import cache_folder
from limbeck.progress import ProgressLines
from limbeck.registry import Problem, suggest
from limbeck.tokenizers import template_hash, tokenizer_hash

FORMAT = 7
"""Raised whenever the same input would give other arrays."""
LOCK_TIMEOUT_S = 3600.0
UNCUT = 1 << 30
"""Positions of a window that holds any document whole."""

Write = Callable[[Path], Mapping[str, Any]]
"""Writes arrays into a folder, and returns their facts."""


def data_problems(config: DataConfig) -> Iterator[Problem]:
    """Mistakes in the options of the data; the files are not read."""
    yield from sources.problems(config.source, "data.source")
    yield from mixture_problems(config)
    for index, text in enumerate(config.texts):
        yield from text_problems(text, f"data.mix[{index}]" if config.mix else "data")


def text_problems(config: DataConfig, at: str) -> Iterator[Problem]:
    """Mistakes in the type, the columns and the reading of a text."""
    if config.streaming and config.max_documents is None:
        yield Problem(
            f"{at}.max_documents",
            "must say how many rows of a streamed data set are read, and does not. Set it, or "
            "streaming: false to download the whole.",
        )
    if config.streaming and "[" in config.split:
        yield Problem(
            f"{at}.split",
            f"must be a whole split where a data set is streamed, got {config.split!r}. Use "
            "max_documents, or streaming: false.",
        )
    wrong = [] if config.type == AUTO else readers.problems(config.type, at)
    yield from wrong
    if wrong:
        return
    kinds = candidates() if config.type == AUTO else [config.type]
    known = list(dict.fromkeys(n for kind in kinds for n in known_columns(reader_of(kind))))
    for name in config.columns:
        if name not in known:
            yield Problem(
                f"{at}.columns.{name}",
                f"type {config.type!r} reads no such column{suggest(name, known)}. It reads: "
                f"{', '.join(known)}.",
            )


def uses_template(config: DataConfig) -> bool:
    """Whether the text, or one of a mixture, is written with the tokenizer's chat template."""
    kinds = [data_type(text, open_source(text, cache_folder() / "data")) for text in config.texts]
    return any(reader_of(kind).uses_template for kind in kinds)


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: Path,
    max_positions: int | None,
    progress: Progress = lambda _rows, _tokens: None,
) -> TextData:
    """Text as tokens, cut and packed; tokenised once and then mapped from disk.

    Any number of processes may ask for the same data at once: one makes it and the others wait. A
    damaged cache is made again.

    Args:
        max_positions: The smaller limit of student and teacher; None if neither has one.

    Raises:
        ConfigError: The configuration cannot be met, before any row is read.
        DataError: Rows are bad, with the file and line of the first five; or nothing is left.
        StorageError: The cache cannot be written.
        TryLaterError: Another process has held the cache for an hour.
    """
    problems = [str(problem) for problem in data_problems(config)]
    problems += length_problems(config, max_positions)
    if problems:
        raise ConfigError("\n".join(problems))
    if config.mix:
        texts = [
            load_data(t, tokenizer, cache=cache, max_positions=max_positions, progress=progress)
            for t in config.texts
        ]
        return load_mixture(config, texts, cache)
    source = open_source(config, cache)
    config = replace(config, type=data_type(config, source))
    reader = reader_of(config.type)
    encoder = Encoder(tokenizer, append_eos=config.append_eos and not reader.uses_template)
    reader.check(encoder)
    identity = identify(config, source, tokenizer, encoder)
    final, facts = cached(
        cache, identity, lambda folder: build(config, source, reader, encoder, progress, folder)
    )
    return TextData.load(final, facts | {"path": config.path}, source.names)


def load_mixture(config: DataConfig, texts: Sequence[TextData], cache: Path) -> TextData:
    """The joined texts of a mixture, through the cache."""
    names = source_names(config)
    final, facts = cached(
        cache,
        {"format": FORMAT} | identity_of(texts, names),
        lambda folder: join(texts, names, folder),
    )
    del facts["mixture"]
    facts["path"] = ", ".join(text.facts["path"] for text in texts)
    files = [f"{name}/{file}" for name, t in zip(names, texts, strict=True) for file in t.names]
    return replace(TextData.load(final, facts, files), sources=mixed_sources(config, texts))


def length_problems(config: DataConfig, max_positions: int | None) -> Iterator[str]:
    """Rows that are longer than student and teacher can read."""
    if max_positions is not None and config.sequence_length > max_positions:
        yield (
            f"data.sequence_length: must be at most {max_positions:,}, the positions student and "
            f"teacher both can read, got {config.sequence_length:,}."
        )


def load_text(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> TextData:
    """`load_data` through the user's cache, with progress; rows have at most `limit` positions."""
    progress = ProgressLines(Console(stderr=True), "tokenising")
    folder = cache_folder() / "data"
    data = load_data(config, tokenizer, cache=folder, max_positions=limit, progress=progress)
    whole = replace(config, sequence_length=UNCUT, pack=False, append_eos=False)
    return replace(data, again=partial(load_text, whole, limit=None))


def identify(
    config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> dict[str, Any]:
    """Everything the arrays depend on."""
    return {
        "format": FORMAT,
        "sha256": source.sha256,
        "type": config.type,
        "columns": dict(config.columns),
        "bad_rows": config.bad_rows,
        "sequence_length": config.sequence_length,
        "pack": config.pack,
        "max_documents": config.max_documents,
        "end_token": encoder.eos,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
    }


def cached(cache: Path, identity: Mapping[str, Any], write: Write) -> tuple[Path, dict[str, Any]]:
    """Folder and facts of the arrays with an identity, which are made where they are missing."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    final = cache / key
    found = manifest(final)
    if found is None:
        found = make(final, identity, write)
    return final, dict(found["facts"])


def make(final: Path, identity: Mapping[str, Any], write: Write) -> dict[str, Any]:
    """Build into the cache, unless another process just did; its manifest."""
    taken = (
        f"{final.parent} is being filled by another process, for over {LOCK_TIMEOUT_S / 60:.0f} "
        "minutes. Start again when it is done."
    )
    with locked(final.parent / ".lock", taken, patience_s=LOCK_TIMEOUT_S):
        sweep(final.parent)
        found = manifest(final)
        if found is None:
            shutil.rmtree(final, ignore_errors=True)
            facts = dict(identity)
            publish(final, lambda folder: facts.update(write(folder)), {"facts": facts})
            found = manifest(final)
    if found is None:
        raise StorageError(f"{final} was written and cannot be read back. Check the disk.")
    return found
