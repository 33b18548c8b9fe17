"""The text that ships with limbeck; see NOTICE beside this file for its sources and licences."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from limbeck.errors import ConfigError

NAMES = ("train", "heldout")


def corpus_path(name: str) -> Path:
    """Path of a part of the corpus, `train` or `heldout`: JSON Lines, packed with gzip."""
    if name not in NAMES:
        raise ConfigError(f"The corpus has the parts {', '.join(NAMES)}, and no {name!r}.")
    return Path(str(importlib.resources.files(__name__) / f"{name}.jsonl.gz"))
