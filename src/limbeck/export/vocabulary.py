"""A tokenizer in GGUF's terms: tokens, merges or scores, pre-tokenizer, and what begins a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter
from gguf import TokenType as Type

from limbeck.errors import ConfigError
from limbeck.models import PreTrainedTokenizerBase
from limbeck.tokenizers import tokens_by_id
from limbeck.tokenizers.identity import serialisation

SPACE = "\u2581"
"""SentencePiece's sign for a space."""
UNREACHED = -1e6
"""Score of a token that no merge makes."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: Mapping[tuple[tuple[str, Any], ...], str] = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", LLAMA3), ("bytes", False)): "llama-bpe",
    (("split", QWEN2), ("bytes", False)): "qwen2",
    (("split", TEKKEN), ("bytes", False)): "tekken",
}
"""llama.cpp's name of each way to cut a text before merging, by its steps."""

IGNORES_MERGES = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp takes a whole word that is a token without merging."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file holds it.

    Attributes:
        model: `gpt2` (byte-level merges) or `llama` (SentencePiece scores).
        pre_tokenizer: llama.cpp's name of it.
        tokens: One a row of the embedding.
        types: Of each token.
        merges: In order; none for `llama`.
        scores: Of each token; none for `gpt2`.
        adds_space: Whether a text gets a space in front (`llama`).
        normalisation: Unicode form the tokenizer applies, which llama.cpp does not.
    """

    model: str
    pre_tokenizer: str
    tokens: list[str]
    types: list[Type]
    merges: list[str]
    scores: list[float]
    adds_space: bool
    normalisation: str | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """A tokenizer in GGUF's terms.

    Args:
        size: Rows of the embedding that are written; rows without a token get a filler.
    """
    tree = serialisation(tokenizer)
    model = tree["model"]
    name = str(tokenizer.name_or_path) or "this student"
    if model["type"] != "BPE":
        raise ConfigError(
            f"A GGUF export needs a byte-pair (BPE) tokenizer, and that of {name} is "
            f"{model['type']}. Use llama.cpp's own converter."
        )
    byte_fallback = bool(model.get("byte_fallback"))
    tokens, types = typed_tokens(tokenizer, tree, size, byte_fallback=byte_fallback)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if byte_fallback:
        scores = merge_scores(tokens, merges)
        space = adds_space(tree, name)
        return Vocabulary("llama", "default", tokens, types, [], scores, space, None)
    pre, form = pre_tokenizer(tree, name), normalisation(tree["normalizer"], name)
    if bool(model.get("ignore_merges")) != (pre in IGNORES_MERGES):
        raise ConfigError(
            f"With the pre-tokenizer {pre} llama.cpp has ignore_merges = {pre in IGNORES_MERGES}, "
            f"and the tokenizer of {name} has {bool(model.get('ignore_merges'))}. It cannot be "
            "exported to GGUF."
        )
    joined = [f"{left} {right}" for left, right in merges]
    return Vocabulary("gpt2", pre, tokens, types, joined, [], False, form)


def typed_tokens(
    tokenizer: PreTrainedTokenizerBase, tree: Mapping[str, Any], size: int, *, byte_fallback: bool
) -> tuple[list[str], list[Type]]:
    """Each row's token and its type."""
    by_id = tokens_by_id(tokenizer)
    if max(by_id) >= size:
        raise ConfigError(
            f"A student must have an embedding row for each token, and has {size:,} rows for ids "
            f"up to {max(by_id):,}. Save it with its own tokenizer."
        )
    added = {each["id"]: each for each in tree["added_tokens"]}
    unknown = tree["model"].get("unk_token")
    types = []
    for row in range(size):
        token = by_id.get(row)
        if token is None:
            types.append(Type.UNUSED)
        elif byte_fallback and token == unknown:
            types.append(Type.UNKNOWN)
        elif row in added:
            types.append(Type.CONTROL if added[row]["special"] else Type.USER_DEFINED)
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            types.append(Type.BYTE)
        else:
            types.append(Type.NORMAL)
    return [by_id.get(row, f"[PAD{row}]") for row in range(size)], types


def merge_scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores with which SentencePiece's algorithm merges in the order of the merges."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair), place)
    return [-float(rank[token]) if token in rank else UNREACHED for token in tokens]


def steps(part: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The parts of a normaliser or pre-tokenizer, in order."""
    if part is None:
        return []
    return list(part[children]) if part["type"] == "Sequence" else [part]


def pre_tokenizer(tree: Mapping[str, Any], name: str) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer."""
    found: list[tuple[str, Any]] = []
    for step in steps(tree["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found.append(("bytes", bool(step["use_regex"])))
        elif step["type"] == "Digits":
            found.append(("digits", bool(step["individual_digits"])))
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(("split", step["pattern"].get("Regex")))
        else:
            found.append((str(step["type"]), step))
    is_hashable = all(isinstance(value, bool | str) for _, value in found)
    known = PRE_TOKENIZERS.get(tuple(found)) if is_hashable else None
    if known is None:
        raise ConfigError(
            f"A GGUF file names the pre-tokenizer, one of those compiled into llama.cpp; limbeck "
            f"knows {', '.join(PRE_TOKENIZERS.values())}, and that of {name} is none of them: "
            f"{tree['pre_tokenizer']}. Use llama.cpp's own converter."
        )
    return known


def normalisation(part: Mapping[str, Any] | None, name: str) -> str | None:
    """The Unicode form a byte-level tokenizer applies first; None without one."""
    kinds = [str(step["type"]) for step in steps(part, "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise ConfigError(
            f"llama.cpp does not normalise a text before byte-level merges, and the tokenizer of "
            f"{name} applies {', '.join(kinds)}. It cannot be exported to GGUF."
        )
    return kinds[0] if kinds else None


def adds_space(tree: Mapping[str, Any], name: str) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front of a text."""
    prepends, unknown = False, []
    for step in steps(tree["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prepends = True
        elif step["type"] != "Replace" or step["content"] != SPACE:
            unknown.append(step["type"])
    for step in steps(tree["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and not step["split"]:
            prepends = prepends or step["prepend_scheme"] != "never"
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            unknown.append(step["type"])
    if unknown:
        raise ConfigError(
            f"llama.cpp replaces spaces of a SentencePiece vocabulary and does nothing else, and "
            f"the tokenizer of {name} applies {', '.join(unknown)}. It cannot be exported to GGUF."
        )
    return prepends


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a text."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    whole = list(tokenizer("a").input_ids)
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            if whole == [*before, *bare, *([tokenizer.eos_token_id] if eos else [])]:
                return bos, eos
    raise ConfigError(
        "A GGUF file can say that a text begins with BOS and ends with EOS, and this tokenizer "
        f"makes {whole} of {bare}. Use llama.cpp's own converter."
    )


def write_vocabulary(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    end_ids: frozenset[int],
) -> None:
    """The tokenizer's part of a file."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "A GGUF file must name the token that ends a text, and this tokenizer has none "
            "(llama.cpp would take token 11). Set tokenizer.eos_token and save it."
        )
    others = sorted(end_ids - {tokenizer.eos_token_id})
    if len(others) > 2:
        raise ConfigError(
            "A GGUF file can name three tokens that end a generation, and generation_config.json "
            f"names {sorted(end_ids)} beside {tokenizer.eos_token_id}. Leave some out."
        )
    bos, eos = added_around(tokenizer)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    writer.add_eos_token_id(int(tokenizer.eos_token_id))
    for token, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    optional = (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    )
    for token, add in optional:
        if token is not None:
            add(int(token))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
