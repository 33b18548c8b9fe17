"""How a row of data becomes tokens: one file a type.

A type checks a row, tokenises it, and marks the tokens the student must predict. Tokens are scored
by position, never by comparison with a padding token, so a tokenizer that pads with its end token
keeps its ends of turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from limbeck.errors import ConfigError
from limbeck.registry import Registry
from limbeck.tokenizers import plain_backend

Values = Mapping[str, Any]
"""A row's columns, under the names a type reads."""


@dataclass(frozen=True)
class Piece:
    """A tokenised row.

    Attributes:
        ids: Its tokens.
        scored: Which of them are to be predicted; never the first.
        num_bytes: UTF-8 bytes of the text that the scored tokens stand for.
    """

    ids: Int32[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]
    num_bytes: int


class Encoder:
    """A tokenizer as the types use it: no truncation, no padding, many texts at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, append_eos: bool) -> None:
        """
        Args:
            append_eos: Whether texts and completions end with its end token.
        """
        self.tokenizer = tokenizer
        self._backend = plain_backend(tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        end = tokenizer.eos_token_id
        if append_eos and end is None:
            raise ConfigError(
                "data.append_eos: needs a tokenizer with an end token, and this one has none. "
                "Set data.append_eos to false."
            )
        self.eos: int | None = int(end) if append_eos and end is not None else None

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Encoding]:
        """Tokens and character offsets of texts, in parallel.

        Args:
            special: Whether the tokenizer adds its special tokens, such as BOS.
        """
        return self._backend.encode_batch(list(texts), add_special_tokens=special)

    def with_end(self, ids: list[int]) -> list[int]:
        """Tokens ending with exactly one end token if one is to be appended."""
        return ids if self.eos is None or ids[-1:] == [self.eos] else [*ids, self.eos]


class Reader(ABC):
    """A type of data."""

    title: ClassVar[str]
    """Name of this type in messages."""
    columns: ClassVar[tuple[str, ...]]
    """Columns a row must have."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that are read if a row has them."""
    answer: ClassVar[str | None] = None
    """Column of the answer, where it is a column of its own."""
    uses_template: ClassVar[bool] = False
    """Whether rows are written with the tokenizer's chat template."""

    @abstractmethod
    def problem(self, values: Values) -> str | None:
        """Why a row cannot be used, starting with the column; None if it can."""

    @abstractmethod
    def encode(self, rows: Sequence[Values], encoder: Encoder) -> list[Piece | str]:
        """Each row's tokens, or why none of them can be scored."""

    def prompt(self, values: Values) -> dict[str, Any]:
        """A row without its last answer, in the columns of `chat` or of `completion`."""
        raise ConfigError(f"data.type: rows of {self.title} have no prompts. Use another type.")

    def check(self, encoder: Encoder) -> None:  # noqa: B027  (most types need nothing of it)
        """Raise a ConfigError where the tokenizer cannot serve this type."""


readers: Registry[Reader] = Registry("data type", __name__)


def reader_of(kind: str) -> Reader:
    """The reader of a data type."""
    return readers.bind(kind, "data")()


def text_problem(value: object, name: str) -> str | None:
    """Why a value is not usable text; None if it is.

    Example:
        >>> text_problem(None, "column 'text'")
        "column 'text' must be a string, got null"
    """
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]}"
        return f"{name} must be a string, got {found}"
    if not value.strip():
        return f"{name} must hold text, got {value[:20]!r}"
    if "\0" in value:
        return f"{name} must hold text, and has a NUL character at {value.index(chr(0))}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{name} must be valid Unicode, and has half a surrogate pair at {error.start}"
    return None


def piece(ids: Sequence[int], scored: Sequence[bool] | Bool[np.ndarray, " n"], size: int) -> Piece:
    """A piece whose first token is never scored."""
    mask = np.array(scored, dtype=np.bool_)
    mask[:1] = False
    return Piece(np.array(ids, dtype=np.int32), mask, size)
