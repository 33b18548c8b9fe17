"""The held-out text in two halves: one that decides, and one that only measures.

What picks a checkpoint or a learning rate has been looked at, and flatters what it picked. So every
fourth document decides, and the figures of the report come from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from limbeck.config import EvaluateConfig
from limbeck.data import TextData
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
        by_document: dict[int, list[int]] = {}
        for row in range(data.num_rows):
            by_document.setdefault(int(data.batch([row]).document_ids[0, 0]), []).append(row)
        if len(by_document) < DECIDES:
            raise DataError(
                f"Held-out text must have at least {DECIDES} documents, since some choose the best "
                f"checkpoint and the others measure it; found {len(by_document)}. Give more, or "
                "cut a long one at its chapters."
            )
        chosen = [d for i, d in enumerate(sorted(by_document)) if i % DECIDES == 0]
        deciding = [by_document.pop(d) for d in chosen]
        self.deciding_rows = spread(data, deciding, config.max_tokens_during)
        self.reporting_rows = spread(data, list(by_document.values()), config.max_tokens)


def spread(data: TextData, documents: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
    """Each document's first row, then each one's second, and so on, up to so many tokens."""
    rows: list[int] = []
    tokens = 0
    for layer in zip_longest(*documents):
        for row in layer:
            if row is None:
                continue
            scored = int(data.batch([row]).num_scored())
            if rows and tokens + scored > max_tokens:
                return sorted(rows)
            rows.append(row)
            tokens += scored
    return sorted(rows)
