"""Rows of a Hugging Face data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets

from limbeck.data.rows import Row, Source
from limbeck.errors import ConfigError
from limbeck.files import nearest_existing, sha256
from limbeck.tokenizers import hub_answers


def from_hub(name: str, split: str, cache: Path) -> Source:
    """A data set of the hub, or of the user's own cache of it."""
    hub_answers(name, None, kind="dataset")
    home = Path(datasets.config.HF_DATASETS_CACHE)
    place = None if os.access(nearest_existing(home), os.W_OK) else str(cache / "datasets")
    try:
        data = datasets.load_dataset(name, split=split, cache_dir=place)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"data.path: {name!r} must be a file or folder here or a data set on the Hugging Face "
            f"hub with a split {split!r}, and could not be loaded: {reason} Check the name, go "
            "online, or give a file."
        ) from error
    return from_dataset(data, f"{name}[{split}]")


def from_dataset(data: datasets.Dataset, label: str) -> Source:
    """Rows of an opened data set, named by the hash of its files."""

    def digest() -> str:
        sums = [sha256(Path(file["filename"])) for file in data.cache_files]
        body = json.dumps([label, data.num_rows, sums])
        return hashlib.sha256(body.encode()).hexdigest()

    def rows(columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Row]:
        missing = [c for c in columns if c not in data.column_names]
        if missing:
            raise ConfigError(
                f"data.columns: {label} has no column {missing[0]!r}; it has "
                f"{', '.join(data.column_names)}. Name yours under data.columns."
            )
        names = data.column_names
        wanted = [*columns, *(c for c in optional if c in names)] if columns else names
        for number, values in enumerate(data.select_columns(wanted), 1):
            yield Row(0, number, values)

    return Source((label,), (label,), digest, rows)
