"""Held-out text for parity, and calibration text."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.config import DataConfig
from limbeck.data import load_text
from limbeck.models import PreTrainedTokenizerBase

WINDOW = 512
"""Positions of a window."""


@dataclass(frozen=True)
class HeldOutText:
    """A text, and how much of it.

    Attributes:
        kind: How a row reads: `text`, `completion` or `chat`.
        tokens: Positions, at most.
    """

    kind: str
    path: str
    tokens: int


def windows_of(
    tokenizer: PreTrainedTokenizerBase, max_positions: int, text: HeldOutText
) -> list[list[int]]:
    """Token ids of windows of single documents, at least two and at most 512 in each."""
    config = DataConfig(
        type=text.kind, path=text.path, sequence_length=min(WINDOW, max_positions), pack=False
    )
    data = load_text(config, tokenizer, max_positions)
    rows = [data.batch([row]).input_ids[0].tolist() for row in data.token_rows(text.tokens)]
    return [row for row in rows if len(row) > 1]
