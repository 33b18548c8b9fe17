"""A byte-pair tokenizer with some of its tokens only, which still reads every text.

Merging is greedy: of all merges that apply, the earliest in the list is done. Without some merges,
a text is still merged step by step as before where every merge that was done on it remains: the
earliest of the whole list is then the earliest of what is left. So a token stays only together with
all it can be merged from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from limbeck.errors import ConfigError
from limbeck.tokenizers.identity import rendered, serialisation
from limbeck.tokenizers.load import backend_of, load_tokenizer
from limbeck.tokenizers.vocabulary import shown, tokens_by_id

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""What a byte-fallback tokenizer writes for characters it has no token for."""

PLAIN = frozenset(map(chr, range(32, 127))) | {"\u2581"}
"""ASCII, and the mark that SentencePiece puts for a space; kept though bytes could say them."""

Tree = dict[str, Any]
"""What a tokenizer.json says."""


def kept_tokens(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> tuple[int, ...]:
    """Ids of the tokens a trimmed tokenizer keeps, increasing; a token's place is its new id.

    Beside the used ones: every added token, special or not; what the chat template writes; the
    bytes, or where there is no fallback to bytes all single characters, so that whatever could be
    encoded still can; and all that any of these can be merged from.

    Args:
        tokenizer: A fast one; it is not changed.
        used: Ids that a data set uses, or that a model's configuration names.

    Raises:
        ConfigError: It is no byte-pair tokenizer, or one that merges in ways limbeck cannot trim.
    """
    tree, tokens = byte_pairs(tokenizer), tokens_by_id(tokenizer)
    wanted = {tokens[i] for i in {*used, *template_ids(tokenizer)}} | set(always_kept(tree))
    kept = with_parts(wanted, tree["model"]["merges"])
    return tuple(i for i in sorted(tokens) if tokens[i] in kept)


def trimmed_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]
) -> PreTrainedTokenizerBase:
    """The tokenizer with these tokens only, as transformers opens it from a folder.

    Args:
        tokenizer: A fast one; it is not changed.
        kept: As `kept_tokens` gives them.

    Raises:
        ConfigError: It cannot be trimmed, or its class does not open what was written.
    """
    tree, tokens = byte_pairs(tokenizer), tokens_by_id(tokenizer)
    new_id = {tokens[old]: new for new, old in enumerate(kept)}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(remapped(tree, new_id), ensure_ascii=False), encoding="utf-8")
        made = load_tokenizer(folder)
    made.name_or_path = tokenizer.name_or_path
    refuse_other_ids(tokenizer, made, new_id)
    return made


def byte_pairs(tokenizer: PreTrainedTokenizerBase) -> Tree:
    """A tokenizer's tokenizer.json, if it is one whose tokens can be left out.

    Raises:
        ConfigError: It is not.
    """
    tree = serialisation(tokenizer)
    model = tree["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            "A vocabulary can be trimmed where text is merged pair by pair (BPE), because then "
            f"what stays is read as before; the tokenizer of {tokenizer.name_or_path} is "
            f"{model['type']}. Leave its vocabulary whole."
        )
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if given := {name: model[name] for name in unlike if model.get(name)}:
        told = ", ".join(f"{name} {value!r}" for name, value in given.items())
        raise ConfigError(
            "A vocabulary can be trimmed where merges join two tokens as they stand, always; the "
            f"tokenizer of {tokenizer.name_or_path} has {told}. Leave its vocabulary whole."
        )
    return tree


def template_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template writes around a conversation, that of an example included."""
    if tokenizer.chat_template is None:
        return []
    return backend_of(tokenizer).encode(rendered(tokenizer), add_special_tokens=False).ids


def always_kept(tree: Tree) -> Iterator[str]:
    """Tokens that stay whatever the data."""
    model = tree["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    yield from (added["content"] for added in tree["added_tokens"])
    if model.get("unk_token") is not None:
        yield model["unk_token"]
    yield from special_ids(tree["post_processor"])
    if model["byte_fallback"] and vocabulary.keys() >= BYTES:
        yield from BYTES | (PLAIN & vocabulary.keys())
        return
    yield from (token for token in vocabulary if len(token) == 1 or token in BYTES)


def with_parts(tokens: Iterable[str], merges: Iterable[Sequence[str]]) -> set[str]:
    """Tokens, and all that they can be merged from.

    Example:
        >>> sorted(with_parts(["abc"], [("a", "b"), ("b", "c"), ("ab", "c")]))
        ['a', 'ab', 'abc', 'b', 'c']
    """
    parts: dict[str, set[str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, set()).update((left, right))
    found = set(tokens)
    waiting = list(found)
    while waiting:
        more = parts.get(waiting.pop(), set()) - found
        found |= more
        waiting += more
    return found


def remapped(tree: Tree, new_id: Mapping[str, int]) -> Tree:
    """A tokenizer.json with some of the tokens, under new ids."""
    model = tree["model"]
    vocabulary = {
        t: new_id[t] for t in sorted(model["vocab"], key=model["vocab"].get) if t in new_id
    }
    merges = [
        [left, right]
        for left, right in model["merges"]
        if left in vocabulary and right in vocabulary and left + right in vocabulary
    ]
    added = [token | {"id": new_id[token["content"]]} for token in tree["added_tokens"]]
    return tree | {
        "model": model | {"vocab": vocabulary, "merges": merges},
        "added_tokens": added,
        "post_processor": with_ids(tree["post_processor"], new_id),
    }


def special_ids(processor: Tree | None) -> dict[str, int]:
    """The special tokens that a post-processor puts around a text, with their ids.

    Raises:
        ConfigError: It is one limbeck does not know.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return {}
    if processor["type"] == "Sequence":
        return {t: i for each in processor["processors"] for t, i in special_ids(each).items()}
    if processor["type"] == "TemplateProcessing":
        told = processor["special_tokens"].values()
        return {t: i for each in told for t, i in zip(each["tokens"], each["ids"], strict=True)}
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return {processor[name][0]: processor[name][1] for name in ("sep", "cls")}
    raise ConfigError(
        "A vocabulary can be trimmed where limbeck knows what puts special tokens around a text; "
        f"this tokenizer has a {processor['type']}. Leave its vocabulary whole."
    )


def with_ids(processor: Tree | None, new_id: Mapping[str, int]) -> Tree | None:
    """A post-processor that `special_ids` knows, with other ids."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        return processor | {"processors": [with_ids(p, new_id) for p in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        told = processor["special_tokens"]
        changed = {n: t | {"ids": [new_id[x] for x in t["tokens"]]} for n, t in told.items()}
        return processor | {"special_tokens": changed}
    both = {name: [processor[name][0], new_id[processor[name][0]]] for name in ("sep", "cls")}
    return processor | both


def refuse_other_ids(
    whole: PreTrainedTokenizerBase, made: PreTrainedTokenizerBase, new_id: Mapping[str, int]
) -> None:
    """Raise where a trimmed tokenizer, once opened, has other tokens than it was given.

    Raises:
        ConfigError: With the first of them.
    """
    wanted, found = {i: token for token, i in new_id.items()}, tokens_by_id(made)
    wrong = [i for i in sorted(wanted | found) if wanted.get(i) != found.get(i)]
    named = [name for name in ("bos", "eos", "pad", "unk") if ends(whole)[name] != ends(made)[name]]
    if wrong or named:
        first = f"id {wrong[0]} is {shown(found.get(wrong[0]))}" if wrong else f"another {named[0]}"
        raise ConfigError(
            f"A trimmed tokenizer must hold the tokens that were kept and no others, but "
            f"{type(made).__name__} opens it with {first}. Leave its vocabulary whole."
        )


def ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """The named special tokens."""
    return {
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "unk": tokenizer.unk_token,
    }
