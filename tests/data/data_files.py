"""Small data files and what `load_data` makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from limbeck.config import DataConfig
from limbeck.data import TextData, load_data
from tests.tokenizers.small import small


def write(path: Path, rows: Iterable[Any]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, tokenizer: Any = None, *, kind: str = "text", **options: Any) -> TextData:
    """Data of a path, its cache beside it."""
    options = {"sequence_length": 16} | options
    max_positions = options.pop("max_positions", None)
    return load_data(
        DataConfig(type=kind, path=str(path), **options),
        small() if tokenizer is None else tokenizer,
        cache=path.parent / "cache",
        max_positions=max_positions,
    )


def scored_tokens(data: TextData, tokenizer: Any) -> str:
    """Text of everything scored, row after row."""
    return str(tokenizer.decode(data.batch(range(data.num_rows)).targets()))
