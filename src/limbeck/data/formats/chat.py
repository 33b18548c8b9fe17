"""`chat`: conversations in the tokenizer's chat template, the assistant's turns scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool
from jinja2 import TemplateError
from tokenizers import Encoding

from limbeck.data.formats import (
    SHAREGPT,
    Encoder,
    Piece,
    Reader,
    Values,
    piece,
    readers,
    text_problem,
)
from limbeck.data.offsets import covered_bytes
from limbeck.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = dict[str, Any]
Turn = tuple[str, str]
"""The rendered conversation up to the start of an answer, and up to its end."""

SENTINEL = "\ue000answer\ue001"
"""Stands in for an answer to locate it; private-use characters that no text should contain."""


@readers.register("chat")
class Chat(Reader):
    """Column `messages`, a list of `{role, content}`; only the assistant's turns are scored."""

    columns: ClassVar[tuple[str, ...]] = ("messages",)

    def problem(self, values: Values) -> str | None:
        """Why the conversation cannot be used."""
        messages = values["messages"]
        if not isinstance(messages, list) or not messages:
            return "column 'messages' must be a list of messages that is not empty"
        told = (message_problem(m, f"messages[{i}]") for i, m in enumerate(messages))
        return next((text for text in told if text), None)

    def check(self, encoder: Encoder) -> None:
        """Raise where the tokenizer has no chat template."""
        if encoder.tokenizer.chat_template is None:
            raise ConfigError(
                "data.type: chat needs a tokenizer with a chat template, and this one has none. "
                "Use the tokenizer of a chat model, or the type `text` or `completion`."
            )

    def encode(self, rows: Sequence[Values], encoder: Encoder) -> list[Piece | str]:
        """Conversations as the template writes them, with what the assistant says scored.

        A template with `{% generation %}` marks says itself which tokens those are. Else they lie
        between the conversation up to an answer and up to its end, each rendered and tokenised.
        """
        template = str(encoder.tokenizer.get_chat_template())
        chats = [[clean(message) for message in row["messages"]] for row in rows]
        if GENERATION_MARK.search(template):
            return [marked(messages, encoder) for messages in chats]
        return incremental(chats, encoder)


def message_problem(message: object, name: str) -> str | None:
    """Why a message cannot be used, or None."""
    if not isinstance(message, dict):
        return f"{name} must be a mapping with role and content, got {type(message).__name__}"
    if "role" not in message and {"from", "value"} <= message.keys():
        return f"{name} has 'from' and 'value', and must have 'role' and 'content'. {SHAREGPT}"
    if message.get("role") not in ROLES:
        return f"{name}.role must be one of {', '.join(ROLES)}, got {message.get('role')!r}"
    if message.get("tool_calls") and not message.get("content"):
        return None
    return text_problem(message.get("content"), f"{name}.content")


def clean(message: Message) -> Message:
    """A message without empty keys; `content` is text, also where a tool call leaves it null."""
    return {k: v for k, v in message.items() if v is not None} | {
        "content": message.get("content") or ""
    }


def render(messages: list[Message], encoder: Encoder, *, open_answer: bool = False) -> str:
    """The conversation as the template writes it, up to where an answer begins if asked."""
    return str(
        encoder.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_answer
        )
    )


def refused(error: Exception) -> str:
    """A template's own objection."""
    return f"messages: the chat template refuses them: {error}"


def marked(messages: list[Message], encoder: Encoder) -> Piece | str:
    """A conversation scored by the template's own marks."""
    try:
        text = render(messages, encoder)
        encoding: Any = encoder.tokenizer.apply_chat_template(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except (TemplateError, TypeError, ValueError) as error:
        return refused(error)
    ids, scored = encoding["input_ids"], np.array(encoding["assistant_masks"], dtype=np.bool_)
    scored[:1] = False
    size = covered_bytes(text, encoding["offset_mapping"], scored & ~special(ids, encoder))
    return piece(ids, scored, size)


def special(ids: Sequence[int], encoder: Encoder) -> Bool[np.ndarray, " tokens"]:
    """Which tokens are the template's own and stand for nothing that was said."""
    return np.isin(np.asarray(ids), list(encoder.special_ids))


def incremental(chats: Sequence[list[Message]], encoder: Encoder) -> list[Piece | str]:
    """Conversations scored by rendering them turn by turn."""
    drafts = [turns(messages, encoder) for messages in chats]
    texts = [
        text
        for draft in drafts
        if not isinstance(draft, str)
        for text in (draft[0], *(part for turn in draft[1] for part in turn))
    ]
    encodings = iter(encoder.encode(texts, special=False))
    pieces: list[Piece | str] = []
    for draft in drafts:
        if isinstance(draft, str):
            pieces.append(draft)
            continue
        whole = next(encodings)
        spans = [(next(encodings), next(encodings)) for _ in draft[1]]
        pieces.append(score_turns(draft[0], whole, spans, encoder))
    return pieces


def turns(messages: list[Message], encoder: Encoder) -> tuple[str, list[Turn]] | str:
    """The whole conversation and its answers' borders as text, or why they cannot be told."""
    found: list[Turn] = []
    try:
        whole = render(messages, encoder)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                return "messages[0]: there is nothing before it that the assistant could answer"
            before = render(messages[:index], encoder, open_answer=True)
            after = render(messages[: index + 1], encoder)
            turn: Turn | None = (before, after)
            if not after.startswith(before) or not whole.startswith(after):
                turn = located(messages, index, whole, encoder)
            if turn is None:
                return (
                    f"messages[{index}]: the chat template writes what came before differently "
                    "in a longer conversation, so the position of the answer is unknown; use a "
                    "template with {% generation %} marks"
                )
            found.append(turn)
    except (TemplateError, TypeError, ValueError) as error:
        return refused(error)
    return whole, found


def located(messages: list[Message], index: int, whole: str, encoder: Encoder) -> Turn | None:
    """An answer's borders in a rendering that is no extension of the shorter ones.

    Some templates rewrite earlier turns: Qwen3's removes their reasoning. What the student reads is
    the rendering of the whole conversation, so the answer is located in that, by rendering it once
    more with a sentinel in the answer's place. An end-of-turn token after it belongs to it.

    Returns:
        None where the text around the sentinel is not the text around the answer, and for tool
        calls, which follow the content.
    """
    message = messages[index]
    if message.get("tool_calls") or SENTINEL in whole:
        return None
    other = {"role": "assistant", "content": SENTINEL}
    text = render([*messages[:index], other, *messages[index + 1 :]], encoder)
    head, found, tail = text.partition(SENTINEL)
    end = len(whole) - len(tail)
    is_same = whole.startswith(head) and whole.endswith(tail) and end > len(head)
    if not found or not is_same:
        return None
    marks = [str(m) for m in encoder.tokenizer.all_special_tokens if tail.startswith(str(m))]
    return whole[: len(head)], whole[: end + max(map(len, marks), default=0)]


def score_turns(
    text: str, whole: Encoding, spans: list[tuple[Encoding, Encoding]], encoder: Encoder
) -> Piece | str:
    """A conversation with its answers scored, their end-of-turn tokens included."""
    ids = whole.ids
    scored = np.zeros(len(ids), dtype=np.bool_)
    for number, (before, after) in enumerate(spans):
        start, end = len(before.ids), len(after.ids)
        if ids[:start] != before.ids or ids[:end] != after.ids:
            return (
                f"messages: a token straddles a border of answer {number}, so it cannot be told "
                "what the assistant said; strip the white space around the answer, or use a "
                "template with {% generation %} marks"
            )
        scored[start : end_of_turn(text, whole, start, end, encoder)] = True
    scored[:1] = False
    said = scored & ~special(ids, encoder)
    return piece(ids, scored, covered_bytes(text, whole.offsets, said))


def end_of_turn(text: str, whole: Encoding, start: int, end: int, encoder: Encoder) -> int:
    """One past an answer's end-of-turn token: the template's white space after it says nothing."""
    ids, offsets = whole.ids, whole.offsets
    last = next((i for i in range(end - 1, start - 1, -1) if ids[i] in encoder.special_ids), None)
    if last is None or text[offsets[last][1] : offsets[end - 1][1]].strip():
        return end
    return last + 1
