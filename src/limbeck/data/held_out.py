"""Held-out text, split into validation and test documents.

Scores on the documents that chose a checkpoint or a learning rate are biased towards that choice.
So every fourth document is for validation, and the report is computed on the others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from limbeck.config import DataConfig, EvaluateConfig, RunConfig
from limbeck.data.load import load_text
from limbeck.data.text_data import TextData
from limbeck.errors import DataError

VALIDATION_EVERY = 4
"""One document of this many is for validation, the others are for the test."""


class HeldOut:
    """Held-out text with its validation rows and its test rows."""

    def __init__(self, data: TextData, config: EvaluateConfig) -> None:
        """
        Args:
            data: One window a row, so that a row belongs to one document.
        """
        self.data = data
        documents = np.unique(data.row_documents)
        if len(documents) < VALIDATION_EVERY:
            raise DataError(
                f"Held-out text must have at least {VALIDATION_EVERY} documents, since some select "
                f"the best checkpoint and the others measure it; got {len(documents)}. Give "
                "more, or cut a long one at its chapters."
            )
        validation = np.arange(len(documents)) % VALIDATION_EVERY == 0
        self.validation_rows = data.token_rows(config.max_tokens_during, documents[validation])
        self.test_rows = data.token_rows(config.max_tokens, documents[~validation])

    @property
    def windows(self) -> list[int]:
        """Indices of the windows that a run measures on."""
        rows = sorted({*self.validation_rows, *self.test_rows})
        return [int(self.data.row_windows[row]) for row in rows]


def held_out_config(config: RunConfig) -> DataConfig | None:
    """How the recipe's held-out text is read: one window a row, so that documents stay apart."""
    if config.evaluate.data is None:
        return None
    return replace(
        config.data,
        path=config.evaluate.data,
        split=config.evaluate.split,
        max_documents=config.evaluate.max_documents,
        pack=False,
    )


def load_held_out(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> HeldOut | None:
    """The recipe's held-out text; None without it."""
    held_out = held_out_config(config)
    if held_out is None:
        return None
    return HeldOut(load_text(held_out, tokenizer, limit), config.evaluate)
