"""Pruning a byte-pair tokenizer so that it still encodes any text.

Merging is greedy: the earliest applicable merge in the list is applied first. A text is encoded as
before if all merges that were applied to it are kept, because their order is unchanged. A token is
therefore kept together with all tokens it can be merged from.
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
"""Byte-fallback tokens."""

PLAIN = frozenset(map(chr, range(32, 127))) | {"\u2581"}
"""ASCII and SentencePiece's space marker; kept although bytes could encode them."""

Tree = dict[str, Any]
"""Contents of a tokenizer.json."""


def kept_tokens(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> tuple[int, ...]:
    """Ids of the tokens a pruned tokenizer keeps, increasing; a token's index is its new id.

    Beside the used ones: all added tokens, those of the chat template, all bytes (without byte
    fallback, all single characters) so that any text can still be encoded, and all tokens that any
    of these can be merged from.

    Args:
        used: Ids used by a data set or named by a model's configuration.
    """
    tree, tokens = byte_pairs(tokenizer), tokens_by_id(tokenizer)
    wanted = {tokens[i] for i in {*used, *template_ids(tokenizer)}} | set(always_kept(tree))
    kept = with_parts(wanted, tree["model"]["merges"])
    return tuple(i for i in sorted(tokens) if tokens[i] in kept)


def pruned_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]
) -> PreTrainedTokenizerBase:
    """The tokenizer with these tokens only, as transformers loads it from a folder."""
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
    """A tokenizer's tokenizer.json, if its tokens can be pruned."""
    tree = serialisation(tokenizer)
    model = tree["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            "Only a byte-pair (BPE) vocabulary can be pruned; the tokenizer of "
            f"{tokenizer.name_or_path} is {model['type']}. Do not prune its vocabulary."
        )
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if options := {name: model[name] for name in unlike if model.get(name)}:
        listed = ", ".join(f"{name} {value!r}" for name, value in options.items())
        raise ConfigError(
            "A vocabulary can be pruned only if merges are deterministic and join whole tokens; "
            f"the tokenizer of {tokenizer.name_or_path} has {listed}. Do not prune its vocabulary."
        )
    return tree


def template_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an example chat, rendered by the chat template."""
    if tokenizer.chat_template is None:
        return []
    return backend_of(tokenizer).encode(rendered(tokenizer), add_special_tokens=False).ids


def always_kept(tree: Tree) -> Iterator[str]:
    """Tokens kept independently of the data."""
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
    """Tokens, and all tokens they can be merged from.

    Example:
        >>> sorted(with_parts(["abc"], [("a", "b"), ("b", "c"), ("ab", "c")]))
        ['a', 'ab', 'abc', 'b', 'c']
    """
    parts: dict[str, set[str]] = {}
    for left, right in merges:
        parts.setdefault(left + right, set()).update((left, right))
    kept = set(tokens)
    waiting = list(kept)
    while waiting:
        more = parts.get(waiting.pop(), set()) - kept
        kept |= more
        waiting += more
    return kept


def remapped(tree: Tree, new_id: Mapping[str, int]) -> Tree:
    """A tokenizer.json with only the tokens in `new_id`, remapped."""
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
    """Special tokens that a post-processor adds, with their ids."""
    if processor is None or processor["type"] == "ByteLevel":
        return {}
    if processor["type"] == "Sequence":
        return {t: i for each in processor["processors"] for t, i in special_ids(each).items()}
    if processor["type"] == "TemplateProcessing":
        specials = processor["special_tokens"].values()
        return {t: i for each in specials for t, i in zip(each["tokens"], each["ids"], strict=True)}
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return {processor[name][0]: processor[name][1] for name in ("sep", "cls")}
    raise ConfigError(
        "A vocabulary can be pruned only with a known post-processor; this tokenizer has a "
        f"{processor['type']}. Do not prune its vocabulary."
    )


def with_ids(processor: Tree | None, new_id: Mapping[str, int]) -> Tree | None:
    """A post-processor with remapped ids."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    if processor["type"] == "Sequence":
        return processor | {"processors": [with_ids(p, new_id) for p in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        specials = processor["special_tokens"]
        changed = {n: t | {"ids": [new_id[x] for x in t["tokens"]]} for n, t in specials.items()}
        return processor | {"special_tokens": changed}
    both = {name: [processor[name][0], new_id[processor[name][0]]] for name in ("sep", "cls")}
    return processor | both


def refuse_other_ids(
    whole: PreTrainedTokenizerBase, made: PreTrainedTokenizerBase, new_id: Mapping[str, int]
) -> None:
    """Raise if a pruned tokenizer, once loaded, holds other tokens than were written."""
    expected, actual = {i: token for token, i in new_id.items()}, tokens_by_id(made)
    wrong = [i for i in sorted(expected | actual) if expected.get(i) != actual.get(i)]
    special = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = [name for name in special if getattr(whole, name) != getattr(made, name)]
    if wrong or named:
        first = (
            f"id {wrong[0]} is {shown(actual.get(wrong[0]))}" if wrong else f"another {named[0]}"
        )
        raise ConfigError(
            f"A pruned tokenizer must hold exactly the kept tokens, but "
            f"{type(made).__name__} loads it with {first}. Do not prune its vocabulary."
        )
