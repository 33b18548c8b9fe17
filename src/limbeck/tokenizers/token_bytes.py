"""The exact bytes that each token of a tokenizer stands for.

The offsets of a Hugging Face encoding count characters. They are wrong wherever a token holds part
of a character, and where a normaliser changed the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from limbeck.errors import ConfigError
from limbeck.tokenizers.load import plain_backend

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of byte fallback."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

ENCODED_AT_ONCE = 256


class Spans(NamedTuple):
    """Tokens of a text: token i is the bytes `edges[i]` to `edges[i + 1]`."""

    ids: list[int]
    edges: Int64[np.ndarray, " n1"]


class TokenBytes:
    """A tokenizer with the bytes of each of its tokens.

    Attributes:
        bytes_of: Bytes of each id; None for an unknown token and for an id without a token.
        added: Ids of added tokens, special ones included. They stand for their own text.
        special: Ids of special tokens.
        begin: Special tokens that the tokenizer puts before a text.
        end: Its end token; None without one.
        turn_end: The token that ends an answer of a conversation; None if unknown.
        unspellable: Byte values that no token spells. A byte-level BPE drops them without a word.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, who: str, turn_end: int | None = None
    ) -> None:
        """
        Args:
            tokenizer: A fast one; it is not changed.
            who: `student` or `teacher`, for messages.
            turn_end: The token that ends an answer of a conversation.

        Raises:
            ConfigError: Its tokens are not known to be bytes of the text.
        """
        self._backend = plain_backend(tokenizer)
        spec = json.loads(self._backend.to_str())
        if problem := model_problem(spec["model"]):
            raise ConfigError(
                f"The {who}'s tokenizer must be byte-exact to be aligned with another, and "
                f"{problem}. Use a model with a BPE or Unigram tokenizer, or one vocabulary for "
                "both models."
            )
        written = [*steps(spec["normalizer"]), *steps(spec["pre_tokenizer"])]
        kinds = {str(step["type"]) for step in (*written, *steps(spec["decoder"]))}
        self._is_byte_level = "ByteLevel" in kinds
        self._writes_spaces = "Metaspace" in kinds or any(
            step["type"] == "Replace" and step["content"] == SPACE for step in written
        )
        self.who = who
        self.normalisers = [str(step["type"]) for step in steps(spec["normalizer"])]
        self.added = {t["id"]: str(t["content"]) for t in spec["added_tokens"]}
        self.special = frozenset(t["id"] for t in spec["added_tokens"] if t["special"])
        self._unknown = unknown_id(self._backend, spec["model"])
        size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.bytes_of = tuple(self._bytes(i) for i in range(size))
        self.begin = tuple(prefix(self._backend.encode("a").ids, self.special))
        self.end = None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self.turn_end = turn_end
        single = {b[0] for b in self.bytes_of if b and len(b) == 1}
        self.unspellable = frozenset(range(256)) - single if self._is_byte_level else frozenset()

    def __len__(self) -> int:
        """One more than the largest id."""
        return len(self.bytes_of)

    def is_byte_token(self, token: int) -> bool:
        """Whether an id is a token of byte fallback."""
        name = self._backend.id_to_token(token) or ""
        return not self._is_byte_level and BYTE_TOKEN.fullmatch(name) is not None

    def spans(self, texts: Sequence[str]) -> list[Spans | str]:
        """Tokens of each text with their exact bytes, or why there are none.

        The tokenizer's own special tokens are not put around a text.
        """
        found: list[Spans | str] = []
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            window = list(texts[start : start + ENCODED_AT_ONCE])
            encodings = self._backend.encode_batch(window, add_special_tokens=False)
            found += [
                self._spans(text.encode(), encoding.ids)
                for text, encoding in zip(window, encodings, strict=True)
            ]
        return found

    def first_token(self, raw: bytes) -> bytes | None:
        """First token of a few bytes inside a text; None where they are no characters."""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return None
        if self._writes_spaces and not self._is_byte_level:
            parts = [text.replace(" ", SPACE)]
        elif self._backend.pre_tokenizer is None:
            parts = [text]
        else:
            parts = [part for part, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)[:1]]
        tokens = [token.id for part in parts for token in self._backend.model.tokenize(part)[:1]]
        return self.bytes_of[tokens[0]] if tokens else None

    def _spans(self, raw: bytes, ids: list[int]) -> Spans | str:
        """Edges of the tokens; between added tokens a space may have been put in front.

        A token that was that space alone is left with no bytes, and belongs to what follows it.
        """
        pieces = [self.bytes_of[i] for i in ids]
        if None in pieces:
            return f"the {self.who}'s tokenizer has no token for a part of it"
        known = [piece for piece in pieces if piece is not None]
        lengths, at, start = [len(piece) for piece in known], 0, 0
        for stop in [*(n for n, i in enumerate(ids) if i in self.added), len(ids)]:
            after = known[stop] if stop < len(ids) else b""
            joined = b"".join(known[start:stop])
            if not raw.startswith(joined + after, at) or (stop == len(ids) and joined != raw[at:]):
                if not (joined[:1] == b" " and raw.startswith(joined[1:] + after, at)):
                    return self._why_not(raw)
                lengths[start] -= 1
                joined = joined[1:]
            at += len(joined) + len(after)
            start = stop + 1
        if at != len(raw):
            return self._why_not(raw)
        return Spans(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def _why_not(self, raw: bytes) -> str:
        missing = sorted(self.unspellable.intersection(raw))
        if missing:
            values = ", ".join(f"0x{value:02X}" for value in missing[:3])
            return f"the {self.who}'s tokenizer has no token for its bytes {values}"
        normaliser = self._backend.normalizer
        if normaliser is not None and normaliser.normalize_str(raw.decode()) != raw.decode():
            names = ", ".join(self.normalisers) or "normaliser"
            return f"the {self.who}'s tokenizer changes it ({names}) before it reads it"
        return f"the {self.who}'s tokens, put together, are not the text"

    def _bytes(self, token: int) -> bytes | None:
        name = self._backend.id_to_token(token)
        if name is None or token == self._unknown:
            return None
        if token in self.added:
            return self.added[token].encode()
        if self._is_byte_level:
            table = byte_of_character()
            return bytes(table[c] for c in name) if all(c in table for c in name) else None
        if hit := BYTE_TOKEN.fullmatch(name):
            return bytes([int(hit[1], 16)])
        return (name.replace(SPACE, " ") if self._writes_spaces else name).encode()


@cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def steps(part: Any) -> Iterator[dict[str, Any]]:
    """Every step of a decoder, pre-tokenizer or normaliser, of nested sequences too."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for name in ("decoders", "pretokenizers", "normalizers"):
        for each in part.get(name) or []:
            yield from steps(each)


def model_problem(model: dict[str, Any]) -> str | None:
    """Why tokens of a model may not be bytes of the text; None where they are."""
    kind = model["type"]
    if kind not in ("BPE", "Unigram"):
        return f"a {kind} model loses bytes of the text"
    if model.get("dropout"):
        return "it has dropout, so that it reads one text in several ways"
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        return "its tokens carry a prefix or suffix that is not in the text"
    return None


def unknown_id(backend: Tokenizer, model: dict[str, Any]) -> int | None:
    """Id of the unknown token."""
    name = model.get("unk_token")
    return backend.token_to_id(name) if name else model.get("unk_id")


def prefix(ids: Iterable[int], special: frozenset[int]) -> Iterable[int]:
    """The special tokens at the beginning."""
    for token in ids:
        if token not in special:
            return
        yield token
