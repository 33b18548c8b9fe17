"""A trimmed tokenizer reads its data as before, reads everything, and has no token too many."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from limbeck.errors import ConfigError
from limbeck.prune import kept_tokens, pruned_tokenizer
from limbeck.prune.tokenizer import BYTES, refuse_other_ids, special_ids, with_ids, with_parts
from limbeck.tokenizers import tokens_by_id
from limbeck.tokenizers.identity import serialisation
from tests.tokenizers.small import (
    BEGIN,
    CHATML,
    END,
    SENTENCES,
    TURN,
    backend,
    edited,
    small,
    wrap,
)

ALL = "".join(chr(byte) for byte in range(32, 127)) + "Grüße déjà vu 日本語 🎉 \n\t Ω"


def bytes_below(**options):
    """A tokenizer in SentencePiece's manner: words after a mark, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", END, BEGIN, TURN], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES[:4] * 5, trainer)
    tree = json.loads(tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    for byte in sorted(BYTES):
        vocabulary[byte] = len(vocabulary)
    tree["model"]["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(tree))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(made, **options)


def whole_words(tree):
    tree["model"]["ignore_merges"] = True


def trim(tokenizer, texts):
    used = {i for text in texts for i in tokenizer(text).input_ids}
    kept = kept_tokens(tokenizer, used)
    return kept, pruned_tokenizer(tokenizer, kept)


def read(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


KINDS = {
    "bytes": lambda: small(template=CHATML, begin=BEGIN, added=["<|tool|>"]),
    "fallback": lambda: bytes_below(template=CHATML, begin=BEGIN, added=["<|tool|>"]),
    "whole words": lambda: edited(whole_words, added=["<|tool|>"]),
}


@pytest.fixture(params=list(KINDS))
def tokenizer(request):
    return KINDS[request.param]()


def test_the_data_become_the_same_tokens_under_new_ids(tokenizer):
    kept, trimmed = trim(tokenizer, SENTENCES[:2])
    assert len(trimmed) == len(kept) < len(tokenizer)
    for text in SENTENCES[:2]:
        assert [kept[i] for i in trimmed(text).input_ids] == tokenizer(text).input_ids
    assert [trimmed.convert_ids_to_tokens(i) for i in range(len(kept))] == [
        tokenizer.convert_ids_to_tokens(i) for i in kept
    ]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(st.sampled_from("abehilorst ü語.7"), max_size=30), max_size=3))
def test_pruning_does_not_change_the_tokens_of_the_data(texts):
    for make in (backend, lambda: bytes_below().backend_tokenizer):
        tokenizer = wrap(make())
        kept, trimmed = trim(tokenizer, texts)
        for text in texts:
            assert [kept[i] for i in trimmed(text).input_ids] == tokenizer(text).input_ids


def test_any_text_can_still_be_encoded_and_decoded(tokenizer):
    _, trimmed = trim(tokenizer, SENTENCES[:1])
    assert trimmed.decode(read(trimmed, ALL)) == tokenizer.decode(read(tokenizer, ALL)) == ALL
    assert len(read(trimmed, ALL)) >= len(read(tokenizer, ALL))


def test_kept_tokens_keep_their_merge_parts_and_merges_use_kept_tokens_only(tokenizer):
    kept, trimmed = trim(tokenizer, SENTENCES[:2])
    whole, left = serialisation(tokenizer)["model"], serialisation(trimmed)["model"]
    tokens = {tokens_by_id(tokenizer)[i] for i in kept}
    expected = [m for m in whole["merges"] if "".join(m) in tokens and {*m} <= tokens]
    assert left["merges"] == expected, "in their old order"
    for first, second in whole["merges"]:
        if first + second in tokens:
            assert {first, second} <= tokens


def test_dropping_a_merge_part_changes_the_tokens_of_the_data():
    tokenizer = small()
    text = SENTENCES[1]
    used = tokenizer(text).input_ids
    alone = sorted(
        {*used, *(i for i, t in tokens_by_id(tokenizer).items() if len(t) == 1), 0, 1, 2}
    )
    bare = pruned_tokenizer(tokenizer, alone)
    assert [alone[i] for i in bare(text).input_ids] != used


def test_special_added_and_template_tokens_are_kept(tokenizer):
    _, trimmed = trim(tokenizer, ["one"])
    for name in (END, BEGIN, TURN, "<|tool|>"):
        assert len(read(trimmed, name)) == len(read(tokenizer, name)) == 1
        assert trimmed.decode(read(trimmed, name)) == tokenizer.decode(read(tokenizer, name))
    assert trimmed.eos_token == trimmed.pad_token == END
    assert trimmed.chat_template == tokenizer.chat_template
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "4."}, {"role": "assistant", "content": "6."}],
            tokenize=False,
        )
        old = tokenizer.convert_ids_to_tokens(read(tokenizer, text))
        assert trimmed.convert_ids_to_tokens(read(trimmed, text)) == old


def test_the_token_added_before_a_text_gets_its_new_id(tokenizer):
    _, trimmed = trim(tokenizer, ["one"])
    if tokenizer.bos_token is None:
        return
    assert trimmed("one").input_ids[0] == trimmed.bos_token_id
    assert tokenizer("one").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing", "Sequence"])
def test_special_tokens_of_every_processor_get_their_new_ids(kind):
    pair = ("sep", 7), ("cls", 9)
    made = {
        "RobertaProcessing": lambda: processors.RobertaProcessing(*pair),
        "BertProcessing": lambda: processors.BertProcessing(*pair),
        "Sequence": lambda: processors.Sequence(
            [processors.ByteLevel(), processors.BertProcessing(*pair)]
        ),
    }[kind]()
    tokenizer = backend()
    tokenizer.post_processor = made
    tree = json.loads(tokenizer.to_str())["post_processor"]
    assert special_ids(tree) == {"sep": 7, "cls": 9}
    assert special_ids(with_ids(tree, {"sep": 0, "cls": 1})) == {"sep": 0, "cls": 1}


def test_without_byte_fallback_all_single_characters_are_kept():
    def known(tree):
        tree["model"]["vocab"]["語"] = 320
        tree["pre_tokenizer"] = tree["decoder"] = None

    tokenizer = edited(known)
    _, trimmed = trim(tokenizer, ["one"])
    assert trimmed.convert_tokens_to_ids("語") == len(trimmed) - 1


@pytest.mark.parametrize("make", [GPT2Tokenizer, Qwen2Tokenizer, LlamaTokenizer])
def test_the_classes_of_published_tokenizers_open_what_is_left(make):
    tree = json.loads(backend(400).to_str())["model"]
    vocabulary = dict(tree["vocab"])
    for token in ("<|endoftext|>", "<unk>", "<s>", "</s>", "\u2581"):
        vocabulary[token] = len(vocabulary)
    tokenizer = make(vocab=vocabulary, merges=[tuple(merge) for merge in tree["merges"]])
    kept, trimmed = trim(tokenizer, SENTENCES[:2])
    assert type(trimmed) is make
    for text in SENTENCES[:2]:
        assert [kept[i] for i in trimmed(text).input_ids] == tokenizer(text).input_ids


def test_trimming_twice_changes_nothing(tokenizer):
    kept, trimmed = trim(tokenizer, SENTENCES[:2])
    again, same = trim(trimmed, SENTENCES[:2])
    assert again == tuple(range(len(kept)))
    assert serialisation(same) == serialisation(trimmed)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "Unigram"),
        (models.WordPiece({"<unk>": 0, "a": 1}, unk_token="<unk>"), "WordPiece"),
        (models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"), "WordLevel"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(model, name):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")
    with pytest.raises(ConfigError, match=rf"byte-pair.* is {name}\. Do not prune"):
        kept_tokens(tokenizer, [1])


@pytest.mark.parametrize(("name", "value"), [("dropout", 0.5), ("end_of_word_suffix", "</w>")])
def test_other_ways_of_merging_are_refused(name, value):
    def change(tree):
        tree["model"][name] = value
        if name != "dropout":
            tree["model"]["merges"] = []

    with pytest.raises(ConfigError, match=rf"has {name} {value!r}\. Do not prune its vocabulary"):
        kept_tokens(edited(change), [1])


def test_an_unknown_processor_is_refused():
    with pytest.raises(ConfigError, match=r"known post-processor; .* has a New\. Do not"):
        special_ids({"type": "New"})


def test_a_class_that_opens_it_with_other_tokens_is_refused():
    tokenizer = small()
    kept, trimmed = trim(tokenizer, SENTENCES[:1])
    new_id = {tokens_by_id(tokenizer)[old]: new for new, old in enumerate(kept)}
    refuse_other_ids(tokenizer, trimmed, new_id)
    trimmed.add_tokens(["more"])
    with pytest.raises(ConfigError, match=rf"exactly .* id {len(kept)} is 'more'\. Do not"):
        refuse_other_ids(tokenizer, trimmed, new_id)
    with pytest.raises(ConfigError, match="with another pad"):
        refuse_other_ids(small(pad=None), trim(tokenizer, SENTENCES[:1])[1], new_id)


def test_merge_parts_are_found_recursively():
    deep = [("x" * i, "x") for i in range(1, 50)]
    assert len(with_parts(["x" * 50], deep)) == 50
