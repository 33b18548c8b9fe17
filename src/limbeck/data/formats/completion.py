"""`completion`: a prompt that is read and a completion that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from tokenizers import Encoding

from limbeck.data.formats import Encoder, Piece, Reader, Values, piece, readers, text_problem


@readers.register("completion")
class Completion(Reader):
    """Columns `prompt`, which is read, and `completion`, which is scored."""

    title: ClassVar[str] = "prompts and completions"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    answer: ClassVar[str | None] = "completion"

    def problem(self, values: Values) -> str | None:
        problems = (text_problem(values[name], f"column {name!r}") for name in self.columns)
        return next(filter(None, problems), None)

    def prompt(self, values: Values) -> dict[str, Any]:
        return {"prompt": values["prompt"]}

    def encode(self, rows: Sequence[Values], encoder: Encoder) -> list[Piece | str]:
        """Prompt tokens, then the completion's.

        Prompt and completion are tokenised as one text if the result starts with the tokens of the
        prompt alone. Otherwise one token would cover the end of the prompt and the start of the
        completion, so the two are tokenised separately, as when a model continues the prompt.
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
    """Tokens of a text without the special tokens that the tokenizer appended."""
    ids, special = encoding.ids, encoding.special_tokens_mask
    count = len(ids)
    while count and special[count - 1] and encoding.offsets[count - 1] == (0, 0):
        count -= 1
    return ids[:count]
