"""Tokenizers that cut one text differently, and texts of many scripts."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.data.corpus import corpus_path
from tests.tokenizers.small import END

BYTES = [f"<0x{value:02X}>" for value in range(256)]
RANGES = {
    "latin": (0x41, 0x17F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x64A),
    "devanagari": (0x900, 0x97F),
    "thai": (0xE01, 0xE3A),
    "hangul": (0xAC00, 0xD7A3),
    "jamo": (0x1100, 0x11FF),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "emoji": (0x1F300, 0x1FAFF),
    "plane2": (0x20000, 0x2A6DF),
    "combining": (0x300, 0x36F),
    "compatibility": (0xFB00, 0xFB06),
    "fullwidth": (0xFF01, 0xFF5E),
    "format": (0x200B, 0x200F),
    "private": (0xE000, 0xE0FF),
    "ascii": (0x20, 0x7E),
    "digits": (0x30, 0x39),
}
GLUE = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "    ", ""]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Words of random scripts with random white space; not empty."""
    dice = random.Random(seed)
    return [random_text(dice) for _ in range(count)]


def random_text(dice: random.Random) -> str:
    """A text of one to twelve words."""
    words = [dice.choice(GLUE)]
    for _ in range(dice.randint(1, 12)):
        low, high = RANGES[dice.choice([*RANGES, "ascii", "ascii", "latin"])]
        words.append("".join(chr(dice.randint(low, high)) for _ in range(dice.randint(1, 9))))
        words.append(dice.choice(GLUE))
    return "".join(words)


@cache
def corpus(documents: int = 24, characters: int = 4000) -> tuple[str, ...]:
    """Beginnings of the documents that ship with limbeck."""
    with gzip.open(corpus_path("heldout"), "rt", encoding="utf-8") as lines:
        return tuple(
            json.loads(line)["text"][:characters] for line in itertools.islice(lines, documents)
        )


def byte_bpe(size: int, *, digits: bool = False, end: str = END) -> Tokenizer:
    """A byte-level BPE; with `digits`, each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    if digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def unigram(size: int, *, scheme: str = "first", end: str = END) -> Tokenizer:
    """A SentencePiece-like Unigram with byte fallback.

    The trainer forgets byte fallback, and makes added tokens of the bytes: a literal "<0x0A>" would
    become a line feed.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", end, *BYTES],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tree = json.loads(tokenizer.to_str())
    tree["model"]["byte_fallback"] = True
    lowest = min(score for _, score in tree["model"]["vocab"]) - 10
    tree["model"]["vocab"] = [[t, lowest if t in BYTES else s] for t, s in tree["model"]["vocab"]]
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(tree))


def changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    """The same with other parts of its tokenizer.json."""
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | parts))


def llama2_like(tokenizer: Tokenizer) -> Tokenizer:
    """A Unigram's vocabulary with a normaliser that writes spaces, and no pre-tokenizer."""
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    normalizer = {"type": "Sequence", "normalizers": steps}
    return changed(tokenizer, pre_tokenizer=None, normalizer=normalizer)


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers of the kinds that models have, by name."""
    large, pieces = byte_bpe(900), unigram(700)
    prefixed = json.loads(large.to_str())["pre_tokenizer"] | {"add_prefix_space": True}
    backends = {
        "bpe": large,
        "small bpe": byte_bpe(400),
        "digits": byte_bpe(900, digits=True, end="</s>"),
        "prefix space": changed(large, pre_tokenizer=prefixed),
        "nfc": changed(large, normalizer={"type": "NFC"}),
        "unigram": pieces,
        "always": unigram(700, scheme="always"),
        "llama 2": llama2_like(pieces),
    }
    ends = {name: "</s>" if name == "digits" else END for name in backends}
    return {name: wrap_plain(backend, end=ends[name]) for name, backend in backends.items()}


def wrap_plain(backend: Tokenizer, *, end: str = END) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers without further special tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)
