"""`completion`: a prompt that is read and a completion that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from tokenizers import Encoding

from limbeck.data.formats import Encoder, Piece, Reader, Values, piece, readers, text_problem


@readers.register("completion")
class Completion(Reader):
    """Columns `prompt`, which is read, and `completion`, which is scored."""

    title: ClassVar[str] = "prompts and completions"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    def problem(self, values: Values) -> str | None:
        told = (text_problem(values[name], f"column {name!r}") for name in self.columns)
        return next((text for text in told if text), None)

    def encode(self, rows: Sequence[Values], encoder: Encoder) -> list[Piece | str]:
        """Prompt tokens, then the completion's.

        Where the tokens of both together begin with those of the prompt alone, they are taken as
        they are. Elsewhere a token would straddle the border, and the two are tokenised apart, as
        they are when a model continues the prompt.
        """
        prompts = [row["prompt"] for row in rows]
        completions = [row["completion"] for row in rows]
        joined = [p + c for p, c in zip(prompts, completions, strict=True)]
        pieces: list[Piece | str] = []
        for prompt, together, alone, text in zip(
            encoder.encode(prompts, special=True),
            encoder.encode(joined, special=True),
            encoder.encode(completions, special=False),
            completions,
            strict=True,
        ):
            begin = without_trailing_special(prompt)
            whole = together.ids if together.ids[: len(begin)] == begin else begin + alone.ids
            ids = encoder.with_end(whole)
            scored = np.arange(len(ids)) >= len(begin)
            pieces.append(piece(ids, scored, len(text.encode())))
        return pieces


def without_trailing_special(encoding: Encoding) -> list[int]:
    """Tokens of a text without what the tokenizer put behind it."""
    ids, special = encoding.ids, encoding.special_tokens_mask
    count = len(ids)
    while count and special[count - 1] and encoding.offsets[count - 1] == (0, 0):
        count -= 1
    return ids[:count]
