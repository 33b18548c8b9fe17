"""The held-out text in two halves: one that decides, and one that only measures.

What picks a checkpoint or a learning rate has been looked at, and flatters what it picked. So every
fourth document decides, and the figures of the report come from the others.
"""

from __future__ import annotations

import numpy as np

from limbeck.config import EvaluateConfig
from limbeck.data.text_data import TextData
from limbeck.errors import DataError

DECIDES = 4
"""Every so manyth document is used to choose, the others to report."""


class HeldOut:
    """Held-out text with the rows that decide and the rows that report."""

    def __init__(self, data: TextData, config: EvaluateConfig) -> None:
        """
        Args:
            data: One window a row, so that a row belongs to one document.
            config: How many tokens of each.

        Raises:
            DataError: There are too few documents to have both.
        """
        self.data = data
        documents = np.unique(data.row_documents)
        if len(documents) < DECIDES:
            raise DataError(
                f"Held-out text must have at least {DECIDES} documents, since some choose the best "
                f"checkpoint and the others measure it; found {len(documents)}. Give more, or "
                "cut a long one at its chapters."
            )
        decides = np.arange(len(documents)) % DECIDES == 0
        self.deciding_rows = data.token_rows(config.max_tokens_during, documents[decides])
        self.reporting_rows = data.token_rows(config.max_tokens, documents[~decides])

    @property
    def windows(self) -> list[int]:
        """Indices of the windows that a run measures on."""
        rows = sorted({*self.deciding_rows, *self.reporting_rows})
        return [int(self.data.row_windows[row]) for row in rows]
