"""A tokenizer of words, one id each, and a random text in it."""

from __future__ import annotations


class Words:
    """Ids are places in a list of words; decoding joins them with spaces."""

    def __init__(self, size: int = 96) -> None:
        """
        Args:
            size: How many words there are.
        """
        self.words = [f"w{i}" for i in range(size)]

    def decode(self, token_ids: list[int]) -> str:
        """The words with spaces between."""
        return " ".join(self.words[i] for i in token_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the words."""
        return [self.words.index(word) for word in text.split()]
