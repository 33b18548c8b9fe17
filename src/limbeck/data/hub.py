"""Rows of a Hugging Face data set: of the Hub, of its cache, or saved on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets

from limbeck.config import ReadConfig
from limbeck.data.rows import Row, Source, is_saved
from limbeck.errors import ConfigError, TryLaterError
from limbeck.files import expanded, nearest_existing, sha256
from limbeck.tokenizers import hub_answers


def from_hub(config: ReadConfig, cache: Path) -> Source:
    """A data set of the Hub, of the user's own cache of it, or in a folder."""
    here = expanded(config.path)
    answers = here.exists() or hub_answers(config.path, config.revision, kind="dataset")
    home = Path(datasets.config.HF_DATASETS_CACHE)
    place = None if os.access(nearest_existing(home), os.W_OK) else str(cache / "datasets")
    try:
        if here.is_dir() and is_saved(here):
            return from_dataset(saved(here, config.split), label_of(config))
        if config.streaming:
            return streamed(config, place)
        data = datasets.load_dataset(
            str(here) if here.exists() else config.path,
            config.subset,
            split=config.split,
            revision=config.revision,
            cache_dir=place,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        kind = ConfigError if answers else TryLaterError
        raise kind(
            f"data.path: {config.path!r} must be a file or folder here or a data set on the "
            f"Hugging Face hub with a split {config.split!r}"
            + (f" of the subset {config.subset!r}" if config.subset else "")
            + f", and could not be loaded: {reason} Check the name, go online, or give a file."
        ) from error
    return from_dataset(data, label_of(config))


def label_of(config: ReadConfig) -> str:
    """A data set in messages.

    Example:
        >>> label_of(ReadConfig(path="org/name", subset="en", split="train[:1%]"))
        'org/name/en[train[:1%]]'
    """
    is_here = expanded(config.path).exists()
    name = Path(config.path).name if is_here else config.path  # no folder of this machine
    subset = f"/{config.subset}" if config.subset else ""
    return f"{name}{subset}[{config.split}]"


def saved(folder: Path, split: str) -> datasets.Dataset:
    """A data set written by `save_to_disk`; of several splits, one."""
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.Dataset):
        return data
    if split not in data:
        raise ConfigError(
            f"data.split: {folder} must have the split {split!r}, and has {', '.join(data)}. Name "
            "one of them; a part of a saved split cannot be named, max_documents takes the first "
            "rows."
        )
    return data[split]


def streamed(config: ReadConfig, place: str | None) -> Source:
    """A data set that is read row by row, named by the commit or the age of its files."""
    builder = datasets.load_dataset_builder(
        config.path, config.subset, revision=config.revision, cache_dir=place
    )
    data = builder.as_streaming_dataset(split=config.split)
    files = (builder.config.data_files or {}).get(config.split)
    origin = [] if files is None else [list(map(str, files)), files.origin_metadata]

    def digest() -> str:
        body = json.dumps([label_of(config), str(builder.hash), origin])
        return hashlib.sha256(body.encode()).hexdigest()

    return source_of(data, label_of(config), digest)


def from_dataset(data: datasets.Dataset, label: str) -> Source:
    """Rows of an opened data set, named by the hash of its files."""

    def digest() -> str:
        sums = [sha256(Path(file["filename"])) for file in data.cache_files]
        body = json.dumps([label, data.num_rows, sums])
        return hashlib.sha256(body.encode()).hexdigest()

    return source_of(data, label, digest)


def source_of(
    data: datasets.Dataset | datasets.IterableDataset, label: str, digest: Callable[[], str]
) -> Source:
    """Rows of an opened or streamed data set."""

    def rows(columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Row]:
        names = data.column_names or list(next(iter(data), {}))
        missing = [c for c in columns if c not in names]
        if missing:
            raise ConfigError(
                f"data.columns: {label} has no column {missing[0]!r}; it has "
                f"{', '.join(names)}. Name yours under data.columns."
            )
        wanted = [*columns, *(c for c in optional if c in names)] if columns else names
        number = 0
        try:
            for number, values in enumerate(data.select_columns(wanted), 1):
                yield Row(0, number, values)
        except OSError as error:
            raise TryLaterError(
                f"{label} could be read up to row {number:,}, and then no more: {error} Start "
                "again later."
            ) from error

    return Source((label,), (label,), digest, rows)
