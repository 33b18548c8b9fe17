"""Held-out text, split into validation and test documents.

Scores on the documents that chose a checkpoint or a learning rate are biased towards that choice.
So every fourth document is for validation, and the report is computed on the others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from limbeck.config import DataConfig, EvaluateConfig, RunConfig
from limbeck.data.load import load_text
from limbeck.data.mixture import source_names
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
    def test_documents(self) -> Int64[np.ndarray, " documents"]:
        """Indices of the documents for the test."""
        return np.unique(self.data.row_documents[self.test_rows])

    @property
    def windows(self) -> list[int]:
        """Indices of the windows that a run measures on."""
        rows = sorted({*self.validation_rows, *self.test_rows})
        return [int(self.data.row_windows[row]) for row in rows]


def held_out_configs(config: RunConfig) -> dict[str, DataConfig]:
    """How each held-out text is read, the one that chooses first; a single one has no name.

    One window a row, so that documents stay apart. A text is read as `data` is; beside a mixture,
    as the source of the same name, or by its first row.
    """
    data, evaluate = config.data, config.evaluate
    alone = replace(data, mix=())
    sources = dict(zip(source_names(data), data.texts, strict=True)) if data.mix else {}
    found = {}
    for name, path in evaluate.paths.items():
        same = next((text for text in data.texts if text.path == path), DataConfig())
        found[name] = replace(
            sources.get(name, alone),
            path=path,
            split=evaluate.split,
            subset=evaluate.subset or same.subset,
            revision=same.revision,
            streaming=same.streaming,
            max_documents=evaluate.max_documents,
            pack=False,
        )
    return found


def load_held_out(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, HeldOut]:
    """The recipe's held-out texts, the one that chooses first."""
    return {
        name: HeldOut(load_text(text, tokenizer, limit), config.evaluate)
        for name, text in held_out_configs(config).items()
    }


def option_of(name: str) -> str:
    """The option of a recipe that names a held-out text."""
    return f"evaluate.data.{name}" if name else "evaluate.data"
