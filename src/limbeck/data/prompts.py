"""The prompts of a text, whether or not its rows are answered already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from limbeck.config import DataConfig
from limbeck.data.build import Draft, checked, note_bad_row, refuse_rows, rows_of
from limbeck.data.detect import candidates, data_type
from limbeck.data.formats import Encoder, reader_of
from limbeck.data.formats.chat import opened
from limbeck.data.formats.completion import without_trailing_special
from limbeck.data.formats.messages import BadRowError, Conversation
from limbeck.data.rows import Row, Source, open_source
from limbeck.models import cache_folder

UNANSWERED = "."
"""Stands for the answer of a row that has none; it is dropped with the other answers."""


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt as text and as tokens.

    Attributes:
        number: Index of its row in the text.
        place: File and line.
        columns: `messages` (and `tools`), or `prompt`.
        ids: What the model reads.
    """

    number: int
    place: str
    columns: Mapping[str, Any]
    ids: tuple[int, ...]

    def answered(self, text: str) -> dict[str, Any]:
        """A row of type `chat` or `completion` with an answer."""
        if "messages" not in self.columns:
            return {**self.columns, "completion": text}
        answer = {"role": "assistant", "content": text}
        return {**self.columns, "messages": [*self.columns["messages"], answer]}


@dataclass(frozen=True)
class AskedPrompts:
    """The prompts of a text.

    Attributes:
        kind: Type of the answered rows, `chat` or `completion`.
        left_out: Rows without a usable prompt, by reason.
        identity: Everything the prompts depend on, but for the tokenizer.
    """

    prompts: Sequence[AskedPrompt]
    kind: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)


def ask(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int, first_tokens: int
) -> AskedPrompts:
    """Read the prompts of a text: everything before the last answer of each row.

    Args:
        longest: Rows with more tokens in their prompt are left out.
        first_tokens: Length of the prompts of `text`.

    Raises:
        DataError: Rows cannot be read, and are not skipped.
    """
    source = unanswered(open_source(config, cache_folder() / "data"), config)
    config = replace(config, type=data_type(config, source))
    reader, encoder = reader_of(config.type), Encoder(tokenizer, append_eos=False)
    reader.check(encoder)
    cut = first_tokens if config.type == "text" else None
    draft, prompts, left_out = Draft(), list[AskedPrompt](), Counter[str]()
    for row in islice(rows_of(config, source, reader), config.max_documents):
        values = checked(draft, row, config, reader)
        if values is None:
            continue
        try:
            columns, ids = read(reader.prompt(values), encoder, cut)
        except BadRowError as error:
            note_bad_row(draft, row, str(error))
            continue
        draft.num_documents += 1
        if not ids:
            left_out["too short or without a prompt"] += 1
        elif len(ids) > longest:
            left_out["with a prompt that is too long"] += 1
        else:
            place = f"{source.names[row.file]}:{row.number}"
            prompts.append(AskedPrompt(draft.num_documents - 1, place, columns, tuple(ids)))
    refuse_rows(draft, config, source)
    if draft.num_bad:
        left_out["that cannot be read"] = draft.num_bad
    kind = "chat" if reader.uses_template else "completion"
    return AskedPrompts(prompts, kind, left_out, identity_of(config, source))


def read(
    columns: dict[str, Any], encoder: Encoder, cut: int | None
) -> tuple[dict[str, Any], list[int]]:
    """A prompt and its tokens; no tokens if there is nothing to answer.

    Args:
        cut: Keep so many first tokens; None keeps all.

    Raises:
        BadRowError: The chat template cannot write it.
    """
    if "messages" in columns:
        messages = columns["messages"]
        if not messages:
            return columns, []
        text = opened(Conversation(messages, columns.get("tools")), encoder)
        return columns, list(encoder.encode([text], special=False)[0].ids)
    [encoding] = encoder.encode([columns["prompt"]], special=True)
    if cut is not None:
        if len(encoding.ids) <= cut:
            return columns, []
        columns = {"prompt": columns["prompt"][: encoding.offsets[cut - 1][1]]}
        if not columns["prompt"].strip():
            return columns, []
        [encoding] = encoder.encode([columns["prompt"]], special=True)
    return columns, without_trailing_special(encoding)


def unanswered(source: Source, config: DataConfig) -> Source:
    """A source whose rows may lack the column of their answer."""
    found = (reader_of(kind).answer for kind in candidates())
    answers = [config.columns.get(name, name) for name in found if name is not None]

    def rows(columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Row]:
        needed = [name for name in columns if name not in answers]
        for row in source.rows(needed, [*optional, *answers] if columns else ()):
            given = {name: value for name, value in row.values.items() if value or value == 0}
            yield replace(
                row, values={**row.values, **{a: given.get(a, UNANSWERED) for a in answers}}
            )

    return replace(source, rows=rows)


def identity_of(config: DataConfig, source: Source) -> dict[str, Any]:
    """Everything that prompts depend on, but for the tokenizer."""
    return {
        "sha256": source.sha256,
        "type": config.type,
        "columns": dict(config.columns),
        "bad_rows": config.bad_rows,
        "max_documents": config.max_documents,
        "sequence_length": config.sequence_length,
    }
