"""Token ids as readable text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

CONTEXT_CHARACTERS = 120
NEIGHBOURS = 4
"""Tokens decoded before a token, so that the space it begins with is kept."""


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that evaluation uses."""

    def decode(self, token_ids: list[int]) -> Any:
        """Text of some token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of some token ids, special tokens included."""
    return str(tokenizer.decode(list(ids)))


def token_text(tokenizer: Tokenizer, before: Sequence[int], token: int) -> str:
    """The text one token adds to the text before it, including a leading space.

    Some tokenizers drop the leading space of a decoded text, so a token is decoded together with
    the tokens before it. A token that ends inside a character is decoded alone.
    """
    near = list(before)[-NEIGHBOURS:]
    left, whole = text_of(tokenizer, near), text_of(tokenizer, [*near, token])
    added = whole[len(left) :] if whole.startswith(left) else ""
    return added or text_of(tokenizer, [token])


def left_context(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The end of a text, about 120 characters of it."""
    text = text_of(tokenizer, list(ids)[-2 * CONTEXT_CHARACTERS :])
    if len(text) <= CONTEXT_CHARACTERS:
        return text
    cut = text[-CONTEXT_CHARACTERS:]
    word = cut.partition(" ")[2]
    return f"…{word or cut}"
