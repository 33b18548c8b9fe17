"""Tokenizers in llama.cpp cut every text as they do here."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from limbeck.errors import ConfigError
from limbeck.export.parity import tokenisation_problems
from limbeck.export.vocabulary import (
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    SPACE,
    TEKKEN,
    added_around,
    vocabulary_of,
)
from limbeck.prune.tokenizer import kept_tokens, pruned_tokenizer
from tests.export.tiny_students import exported, made
from tests.models.tiny import tiny_tokenizer
from tests.tokenizers.small import BEGIN, END, SENTENCES, backend, edited, small, wrap

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
AFTER_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split_by(pattern):
    """A pattern, then bytes."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), AFTER_SPLIT])


CUTS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": split_by(LLAMA3),
    "qwen2": split_by(QWEN2),
    "tekken": split_by(TEKKEN),
}


def cut_by(name):
    """A tokenizer with a pre-tokenizer, which decides its merges as well."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTS[name], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END, BEGIN, "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "I'm 1234567 years, 12 months.\n\n  x"] * 9, trainer)
    return tokenizer


def sentencepiece(prepend):
    """A byte-fallback tokenizer as converters make them: every pair that makes a token merges."""
    words = [SPACE + word for text in SENTENCES for word in text.split()]
    plain = sorted({c for word in words for c in word})
    longer = sorted({word[:n] for word in words for n in range(2, len(word) + 1)}, key=len)
    tokens = ["<unk>", END, BEGIN, *(f"<0x{b:02X}>" for b in range(256)), *plain, *longer]
    known = set(plain) | set(longer)
    merges = [
        (token[:n], token[n:])
        for token in longer
        for n in range(1, len(token))
        if token[:n] in known and token[n:] in known
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    first = [normalizers.Prepend(SPACE)] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrap(tokenizer, added=["<|extra|>"])


def problems(tokenizer, folder):
    """What llama.cpp cuts otherwise."""
    with exported(made(tokenizer=tokenizer), folder) as (file, runtime):
        windows = [tokenizer(text).input_ids for text in SENTENCES]
        return list(tokenisation_problems(tokenizer, runtime, file, windows))


def test_every_known_pre_tokenizer_is_tested():
    assert sorted(CUTS) == sorted(PRE_TOKENIZERS.values())


@pytest.mark.parametrize("name", sorted(CUTS))
def test_a_byte_level_tokenizer_gives_the_same_tokens(name, tmp_path):
    tokenizer = wrap(cut_by(name), added=["<|extra|>"])
    assert vocabulary_of(tokenizer, len(tokenizer)).pre_tokenizer == name
    assert problems(tokenizer, tmp_path) == []


@pytest.mark.parametrize("prepend", [False, True])
def test_a_sentencepiece_tokenizer_gives_the_same_tokens(prepend, tmp_path):
    assert problems(sentencepiece(prepend), tmp_path) == []


def test_a_pruned_tokenizer_gives_the_same_tokens(tmp_path):
    whole = small()
    pruned = pruned_tokenizer(whole, kept_tokens(whole, whole("A still boils").input_ids))
    assert len(pruned) < len(whole)
    assert problems(pruned, tmp_path) == []


def test_unicode_normalisation_is_noted_and_texts_compared_after_it(tmp_path):
    tokenizer = backend()
    tokenizer.normalizer = normalizers.NFC()
    wrapped = wrap(tokenizer)
    assert vocabulary_of(wrapped, len(wrapped)).normalisation == "NFC"
    assert problems(wrapped, tmp_path) == []


def test_bos_is_added_where_the_tokenizer_adds_it(tmp_path):
    tokenizer = small(begin=BEGIN)
    assert added_around(tokenizer) == (True, False)
    assert added_around(small()) == (False, False)
    assert problems(tokenizer, tmp_path) == []


def lowercase(tree):
    tree["normalizer"] = {"type": "Lowercase"}


def spaced(tree):
    tree["pre_tokenizer"]["add_prefix_space"] = True


def whole_words(tree):
    tree["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (tiny_tokenizer(), "byte-pair .BPE. tokenizer, .* is WordLevel"),
        (edited(lowercase), "does not normalise .* applies Lowercase"),
        (edited(spaced), "limbeck knows gpt-2, smollm.*none of them"),
        (edited(whole_words), "ignore_merges = False, and .* has True"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        vocabulary_of(tokenizer, len(tokenizer))


def test_a_tokenizer_without_end_token_is_refused(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"token that ends a text.*has none"),
        exported(made(tokenizer=small(end=None, pad=None)), tmp_path),
    ):
        pass


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ConfigError, match="has 10 rows for ids up to"):
        vocabulary_of(small(), 10)


def test_a_sentencepiece_tokenizer_that_changes_texts_is_refused():
    tree = json.loads(sentencepiece(False).backend_tokenizer.to_str())
    tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
    with pytest.raises(ConfigError, match="applies NFKC"):
        vocabulary_of(wrap(Tokenizer.from_str(json.dumps(tree))), 2000)
