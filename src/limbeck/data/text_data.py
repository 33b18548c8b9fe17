"""Tokenised text on disk, read as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt64
from transformers import PreTrainedTokenizerBase

from limbeck.batch import Batch, Window
from limbeck.data.formats import reader_of
from limbeck.data.order import Portion

GOLDEN = (5**0.5 - 1) / 2

ARRAYS = (
    "tokens",
    "scored",
    "windows",
    "row_windows",
    "row_ends",
    "document_hashes",
    "document_bytes",
    "document_scored",
    "document_ends",
    "document_places",
    "document_weights",
    "document_sources",
)


@dataclass(frozen=True)
class MixedSource:
    """A source of a mixture: consecutive rows of the joined text.

    Attributes:
        weight: Its part of the trained tokens, relative to the other sources' weights.
        num_scored: Trained tokens of one pass over its rows.
        facts: Those of its text.
    """

    name: str
    weight: float
    first_row: int
    num_rows: int
    num_scored: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class TextData:
    """Texts as tokens, cut into windows and packed into rows; memory-mapped.

    A document is a row of the source. A window is a part of one document; its
    positions start at 0 and it attends to nothing else. A row holds one or more windows.

    Attributes:
        tokens: All documents' tokens, end to end.
        scored: Which of them are to be predicted.
        windows: Of each window its first token, its positions, and its document.
        row_windows: Windows of the first row, of the second, and so on.
        row_ends: Where each row's windows end in `row_windows`.
        document_hashes: Of each document's content.
        document_bytes: UTF-8 bytes of each document's scored text; 0 for a dropped one.
        document_scored: Scored tokens of each document.
        document_ends: Where each document ends in `tokens`; a dropped one has no tokens.
        document_places: File and line of each document.
        document_weights: Factor of the objective on each document's tokens; empty where the text
            has no weight column.
        document_sources: Index of each document's source in the fact of this name, -1 in a part of
            a mixture without a source column; empty where the text has none.
        names: Of the files, relative to the data path; in a mixture below the source's name.
        facts: Hashes, counts, and dropped documents by reason; JSON.
        sources: Of a mixture, in the order of their rows; of any other text none.
        again: Reads the same documents for another tokenizer, each in one window.
    """

    tokens: Int32[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]
    windows: Int64[np.ndarray, "windows 3"]
    row_windows: Int64[np.ndarray, " windows"]
    row_ends: Int64[np.ndarray, " rows"]
    document_hashes: UInt64[np.ndarray, " documents"]
    document_bytes: Int64[np.ndarray, " documents"]
    document_scored: Int64[np.ndarray, " documents"]
    document_ends: Int64[np.ndarray, " documents"]
    document_places: Int64[np.ndarray, "documents 2"]
    document_weights: Float32[np.ndarray, " weighted"]
    document_sources: Int32[np.ndarray, " sourced"]
    names: tuple[str, ...]
    facts: Mapping[str, Any]
    sources: tuple[MixedSource, ...] = ()
    again: Callable[[PreTrainedTokenizerBase], TextData] | None = None

    @classmethod
    def load(cls, folder: Path, facts: Mapping[str, Any], names: Sequence[str]) -> TextData:
        """The text in a cache folder whose manifest has been checked."""
        arrays = {each: np.load(folder / f"{each}.npy", mmap_mode="r") for each in ARRAYS}
        return cls(**arrays, names=tuple(names), facts=facts)

    @property
    def num_rows(self) -> int:
        """Rows that batches are made of."""
        return len(self.row_ends)

    @property
    def num_documents(self) -> int:
        """Rows of the source, whether or not anything of them is scored."""
        return len(self.document_bytes)

    @property
    def num_scored(self) -> int:
        """Tokens to be predicted in one pass over all rows."""
        return int(self.facts["scored"])

    def document_name(self, document: int) -> str:
        """Where a document came from, as `file:line`; no folder of this machine is in it."""
        file, number = self.document_places[document].tolist()
        return f"{self.names[file]}:{number}"

    def column_source(self, document: int) -> str | None:
        """A document's source as its column names it; None where its text has no such column."""
        number = int(self.document_sources[document]) if len(self.document_sources) else -1
        return None if number < 0 else str(self.facts["document_sources"][number])

    def document_source(self, document: int) -> str:
        """A document's source: as its column names it, else its file."""
        return self.column_source(document) or self.document_name(document).rpartition(":")[0]

    @property
    def portions(self) -> tuple[Portion, ...]:
        """Rows of each source, with the share of rows that gives its share of the tokens."""
        if not self.sources:
            return (Portion(0, self.num_rows, 1.0),)
        rates = [s.weight * s.num_rows / s.num_scored for s in self.sources]
        return tuple(
            Portion(source.first_row, source.num_rows, rate / sum(rates))
            for source, rate in zip(self.sources, rates, strict=True)
        )

    @property
    def text_facts(self) -> tuple[Mapping[str, Any], ...]:
        """Facts of each source of a mixture; of any other text its own."""
        return tuple(source.facts for source in self.sources) or (self.facts,)

    @property
    def types(self) -> tuple[str, ...]:
        """Data types of its sources, each once."""
        return tuple(dict.fromkeys(str(facts["type"]) for facts in self.text_facts))

    @property
    def is_conversation(self) -> Bool[np.ndarray, " documents"]:
        """Whether each document is written with the tokenizer's chat template."""
        kinds = [reader_of(str(facts["type"])).uses_template for facts in self.text_facts]
        return np.repeat(kinds, [facts["documents"] for facts in self.text_facts])

    def whole_in(self, tokenizer: PreTrainedTokenizerBase) -> TextData:
        """The same documents as another tokenizer, and its chat template, write them; not cut."""
        assert self.again is not None, "this text was not read through load_text"
        return self.again(tokenizer)

    def row_length(self, row: int) -> int:
        """Positions of a row, padding not among them."""
        return int(self.windows[self._windows_of(row), 1].sum())

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows as a batch on the CPU; see `Batch.packed`."""
        weighted = len(self.document_weights) > 0
        return Batch.packed([list(self._row(row)) for row in rows], weighted=weighted)

    @property
    def row_documents(self) -> Int64[np.ndarray, " rows"]:
        """The document each row begins with; non-decreasing, because rows keep the data's order."""
        firsts = np.concatenate([[0], self.row_ends[:-1]])
        return np.asarray(self.windows[self.row_windows[firsts], 2])

    def token_rows(
        self, max_tokens: int, documents: Int64[np.ndarray, " chosen"] | None = None
    ) -> list[int]:
        """Rows of at most `max_tokens` positions in all, from as many documents as possible.

        One row of each document, then another of each, and so on, from places spread over it; of
        the last round, evenly spaced documents. Deterministic; at least one row, and all rows where
        they fit.

        Args:
            documents: Take rows that begin with one of these only; all by default.
        """
        ends = np.cumsum(self.windows[self.row_windows, 1])[self.row_ends - 1]
        lengths = np.diff(ends, prepend=0)
        chosen: list[int] = []
        left = max_tokens
        rounds = self._rounds()
        if documents is not None:
            rounds = np.where(np.isin(self.row_documents, documents), rounds, -1)
        for turn in range(int(rounds.max()) + 1):
            rows = np.flatnonzero(rounds == turn)
            size = int(lengths[rows].sum())
            if size > left:
                rows = evenly_spaced(rows, lengths, left)
                chosen += rows.tolist()
                break
            chosen += rows.tolist()
            left -= size
        return sorted(chosen) or [int(np.flatnonzero(rounds == 0)[0])]

    def _rounds(self) -> Int64[np.ndarray, " rows"]:
        """In which round over the documents each row is taken; a row counts for its first one."""
        documents = self.row_documents
        begins = np.searchsorted(documents, documents)
        places = np.arange(self.num_rows) - begins
        spread = (places * GOLDEN + 0.5) % 1  # any first few are far from each other
        rounds = np.empty(self.num_rows, dtype=np.int64)
        rounds[np.lexsort((spread, documents))] = places
        return rounds

    def _row(self, row: int) -> Iterator[Window]:
        for start, length, document in self.windows[self._windows_of(row)].tolist():
            span = slice(start + 1, start + length + 1)
            weight = float(self.document_weights[document]) if len(self.document_weights) else 1.0
            yield Window(self.tokens[start : span.stop], self.scored[span], document, weight)

    def _windows_of(self, row: int) -> Int64[np.ndarray, " n"]:
        """Windows of a row."""
        begin = int(self.row_ends[row - 1]) if row else 0
        return np.asarray(self.row_windows[begin : int(self.row_ends[row])])


def evenly_spaced(
    rows: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " rows"], most: int
) -> Int64[np.ndarray, " m"]:
    """As many of the rows, evenly spaced among them, as hold at most so many positions."""
    count = min(len(rows), int(most * len(rows) // lengths[rows].sum()))
    while count:
        picked = rows[(np.arange(count) * len(rows) + len(rows) // 2) // count]
        if lengths[picked].sum() <= most:
            return picked
        count -= 1
    return rows[:0]


def overlap(train: TextData, held_out: TextData) -> int:
    """Held-out documents whose content is also in the training data, for a warning."""
    return int(np.isin(held_out.document_hashes, train.document_hashes).sum())
