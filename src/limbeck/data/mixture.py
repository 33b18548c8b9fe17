"""A mixture: several texts joined into one, each with its share of the tokens."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.batch import Batch
from limbeck.config import DataConfig, ReadConfig
from limbeck.data.build import KINDS, SHOWN, num_repeated
from limbeck.data.columns import Kinds, columns
from limbeck.data.order import MixedOrder
from limbeck.data.rows import stem
from limbeck.data.text_data import MixedSource, TextData
from limbeck.registry import Problem

MOST_PASSES = 4.0
"""Passes over a text that teach nearly as much as new text (Muennighoff et al., 2023,
arXiv:2305.16264)."""
CALIBRATION_ROWS = 1 << 16

NAME = re.compile(r"\w[\w.-]*")


def source_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the sources of a mixture: their own, or the last part of their paths."""
    return tuple(text.name or stem(text.path) for text in config.mix)


def mixture_problems(config: DataConfig) -> Iterator[Problem]:
    """A text without a path, a path beside a mixture, and names that are no names or used twice."""
    if not config.path and not config.mix:
        yield Problem("data.path", "is missing, and a run needs it (or data.mix, several texts).")
    if not config.mix:
        return
    for field in fields(ReadConfig):
        empty = field.default if field.default_factory is MISSING else field.default_factory()
        if vars(config)[field.name] != empty:
            yield Problem(
                f"data.{field.name}",
                "belongs to each text of data.mix, and stands beside it. Move it into them, or "
                "remove data.mix.",
            )
    names = source_names(config)
    for index, (text, name) in enumerate(zip(config.mix, names, strict=True)):
        at = f"data.mix[{index}]"
        if not text.path:
            yield Problem(f"{at}.path", "is missing, and a run needs it.")
        elif not NAME.fullmatch(name):
            yield Problem(
                f"{at}.name",
                f"must be letters, digits, '.', '-' or '_', got {name!r}. Give the text a name.",
            )
        elif name in names[:index]:
            yield Problem(
                f"{at}.name",
                f"must differ from those of the other texts, got {name!r} twice. Give the text "
                "another name.",
            )


def join(texts: Sequence[TextData], names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the arrays of a mixture into a folder; its facts.

    Its texts stand one after another, rows and documents as they were.

    Args:
        names: Of the sources.
    """
    tokens = starts([len(text.tokens) for text in texts])
    windows = starts([len(text.windows) for text in texts])
    documents = starts([text.num_documents for text in texts])
    files = starts([len(text.names) for text in texts])
    weighted = any(len(text.document_weights) for text in texts)
    sources = joined_sources(texts)
    rows: Kinds = {"row_windows": (np.int64, 0), "row_ends": (np.int64, 0)}
    with columns(folder, {**KINDS, **rows}) as to:
        for text, t, w, d, f in zip(texts, tokens, windows, documents, files, strict=True):
            to["windows"].extend(text.windows + np.array([t, 0, d]))
            to["row_windows"].extend(text.row_windows + w)
            to["row_ends"].extend(text.row_ends + w)
            to["document_ends"].extend(text.document_ends + t)
            to["document_places"].extend(text.document_places + np.array([f, 0]))
            if weighted:
                to["document_weights"].extend(weights_of(text))
            if sources:
                to["document_sources"].extend(source_numbers(text, sources))
            for name in ("tokens", "scored", "document_hashes", "document_bytes"):
                to[name].extend(vars(text)[name])
            to["document_scored"].extend(text.document_scored)
    return joined_facts(texts, names, num_repeated(folder))


def starts(lengths: Sequence[int]) -> list[int]:
    """Where each of several arrays begins when they are joined."""
    return [0, *np.cumsum(lengths).tolist()][:-1]


def weights_of(text: TextData) -> Any:
    """Weights of a text's documents, which are 1 where it has no column of them."""
    has = len(text.document_weights) > 0
    return text.document_weights if has else np.ones(text.num_documents, dtype=np.float32)


def joined_sources(texts: Sequence[TextData]) -> list[str]:
    """The names in all texts' columns of sources, each once."""
    return list(dict.fromkeys(name for t in texts for name in t.facts["document_sources"]))


def source_numbers(text: TextData, sources: Sequence[str]) -> Any:
    """Numbers of the documents' sources among all sources, -1 where the text has no column."""
    if not len(text.document_sources):
        return np.full(text.num_documents, -1, dtype=np.int32)
    own = [sources.index(name) for name in text.facts["document_sources"]]
    return np.array(own, dtype=np.int32)[text.document_sources]


def joined_facts(
    texts: Sequence[TextData], names: Sequence[str], duplicates: int
) -> dict[str, Any]:
    """Facts of a mixture, with those of each source."""
    every = [text.facts for text in texts]
    counted = ("documents", "documents_used", "windows", "positions", "scored", "rows")
    bad = [
        f"{n}/{line}" for n, f in zip(names, every, strict=True) for line in f["bad_rows"]["first"]
    ]
    sums = "".join(facts["sha256"] for facts in every)
    return {
        **{name: sum(facts[name] for facts in every) for name in counted},
        "sha256": hashlib.sha256(sums.encode()).hexdigest(),
        "bad_rows": {"skipped": sum(f["bad_rows"]["skipped"] for f in every), "first": bad[:SHOWN]},
        "duplicates": duplicates,
        "document_sources": joined_sources(texts),
        "dropped": dict(sum((Counter(facts["dropped"]) for facts in every), Counter[str]())),
        "largest_token_id": max(facts["largest_token_id"] for facts in every),
        "sequence_length": every[0]["sequence_length"],
        "packing_efficiency": sum(f["positions"] for f in every)
        / sum(f["rows"] * f["sequence_length"] for f in every),
        "sources": dict(zip(names, map(lasting, texts), strict=True)),
    }


def identity_of(texts: Sequence[TextData], names: Sequence[str]) -> dict[str, Any]:
    """Everything a mixture's arrays depend on; weights are not part of it."""
    return {"mixture": [[name, lasting(text)] for name, text in zip(names, texts, strict=True)]}


def lasting(text: TextData) -> dict[str, Any]:
    """Facts of a text, but for the path it was read from."""
    return {name: fact for name, fact in text.facts.items() if name != "path"}


def mixed_sources(config: DataConfig, texts: Sequence[TextData]) -> tuple[MixedSource, ...]:
    """The sources of a mixture."""
    firsts = starts([text.num_rows for text in texts])
    return tuple(
        MixedSource(name, spec.weight, first, text.num_rows, text.num_scored, text.facts)
        for name, spec, first, text in zip(
            source_names(config), config.mix, firsts, texts, strict=True
        )
    )


def passes(data: TextData, num_rows: int) -> dict[str, float]:
    """How often a run of so many rows reads each source."""
    portions = zip(data.sources, data.portions, strict=True)
    return {
        source.name: num_rows * portion.share / portion.num_rows for source, portion in portions
    }


@dataclass(frozen=True)
class FirstRows:
    """A text whose rows are in the order in which a run reads them, each once.

    Layers and widths chosen on its beginning are then chosen on all sources of a mixture.
    """

    data: TextData
    order: Sequence[int]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.order)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of the whole text."""
        return self.data.facts

    def row_length(self, row: int) -> int:
        """Positions of a row."""
        return self.data.row_length(self.order[row])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        return self.data.batch([self.order[row] for row in rows])


def in_run_order(data: TextData, seed: int) -> TextData | FirstRows:
    """A mixture with the rows that a run reads first; any other text as it is."""
    if not data.sources:
        return data
    rows = MixedOrder(seed, data.portions).rows(0, min(data.num_rows, CALIBRATION_ROWS))
    return FirstRows(data, list(dict.fromkeys(rows)))
