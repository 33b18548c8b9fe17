"""`text`: plain text, every token of it scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from limbeck.data.formats import Encoder, Piece, Reader, Values, piece, readers, text_problem
from limbeck.data.offsets import covered_bytes


@readers.register("text")
class Text(Reader):
    """Plain text in the column `text`; every token but the first is scored."""

    title: ClassVar[str] = "plain text"
    columns: ClassVar[tuple[str, ...]] = ("text",)

    def problem(self, values: Values) -> str | None:
        return text_problem(values["text"], "column 'text'")

    def prompt(self, values: Values) -> dict[str, Any]:
        return {"prompt": values["text"]}

    def encode(self, rows: Sequence[Values], encoder: Encoder) -> list[Piece | str]:
        """Each text with the tokenizer's own special tokens, and the end token."""
        texts = [row["text"] for row in rows]
        pieces: list[Piece | str] = []
        for text, encoding in zip(texts, encoder.encode(texts, special=True), strict=True):
            ids = encoder.with_end(encoding.ids)
            predicted = np.ones(len(encoding.ids), dtype=np.bool_)
            predicted[:1] = False
            size = covered_bytes(text, encoding.offsets, predicted)
            pieces.append(piece(ids, np.ones(len(ids), dtype=np.bool_), size))
        return pieces
