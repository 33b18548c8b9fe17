"""`chat`: conversations in the tokenizer's chat template, the assistant's turns scored."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool
from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from limbeck.data.formats import Encoder, Piece, Reader, Values, piece, readers
from limbeck.data.formats.messages import (
    BadRowError,
    Conversation,
    Message,
    read_messages,
    read_tools,
)
from limbeck.data.offsets import covered_bytes
from limbeck.errors import ConfigError
from limbeck.tokenizers import backend_of

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turn = tuple[str, str]
"""The rendered conversation up to the start of an answer, and up to its end."""

SENTINEL = "\ue000answer\ue001"
"""Stands in for an answer to locate it; private-use characters that no text should contain."""


PROBE = "limbeck_probe_"
"""Stands in for the name of a tool, to see whether a template writes it."""


class Dialogue(Reader):
    """A type whose rows are conversations; only the assistant's turns are scored."""

    uses_template: ClassVar[bool] = True

    @abstractmethod
    def conversation(self, values: Values) -> Conversation:
        """The conversation of a row."""

    def problem(self, values: Values) -> str | None:
        try:
            self.conversation(values)
        except BadRowError as error:
            return str(error)
        return None

    def prompt(self, values: Values) -> dict[str, Any]:
        chat = self.conversation(values)
        is_answered = chat.messages[-1]["role"] == "assistant"
        messages = chat.messages[:-1] if is_answered else chat.messages
        return {"messages": messages} | ({"tools": chat.tools} if chat.tools else {})

    def check(self, encoder: Encoder) -> None:
        """Raise where the tokenizer has no chat template."""
        if encoder.tokenizer.chat_template is None:
            raise ConfigError(
                f"data.type: {self.title} needs a tokenizer with a chat template, and this one has "
                "none. Use the tokenizer of a chat model, or the type `text` or `completion`; "
                "data.columns: {prompt: instruction, completion: output} reads Alpaca's rows so."
            )

    def encode(self, rows: Sequence[Values], encoder: Encoder) -> list[Piece | str]:
        """Conversations rendered by the template, with the assistant's tokens scored.

        A template with `{% generation %}` marks defines these tokens. Otherwise they are found by
        rendering and tokenising the conversation up to the start and up to the end of each answer.
        """
        template = str(encoder.tokenizer.get_chat_template())
        chats = [self.conversation(row) for row in rows]
        if GENERATION_MARK.search(template):
            return [marked(chat, encoder) for chat in chats]
        return incremental(chats, encoder)


@readers.register("chat")
class Chat(Dialogue):
    """Column `messages`, a list of `{role, content}`; only the assistant's turns are scored."""

    title: ClassVar[str] = "chat"
    columns: ClassVar[tuple[str, ...]] = ("messages",)
    optional: ClassVar[tuple[str, ...]] = ("tools",)

    def conversation(self, values: Values) -> Conversation:
        """The messages and the tools they may call."""
        return Conversation(
            read_messages(values["messages"], "messages"), read_tools(values.get("tools"))
        )


def render(chat: Conversation, encoder: Encoder, *, open_answer: bool = False) -> str:
    """The conversation as the template writes it, up to where an answer begins if asked."""
    return str(
        encoder.tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=open_answer
        )
    )


def first_messages(chat: Conversation, count: int) -> Conversation:
    """The first messages of a conversation."""
    return replace(chat, messages=chat.messages[:count])


def unwritten_tools(chat: Conversation, encoder: Encoder) -> str | None:
    """What the template omits from a conversation with tools; None if nothing.

    Each name of a tool and each result is replaced by a probe, which must be in the rendering.
    """
    probed, probes = deepcopy(chat), dict[str, str]()

    def probe(place: str) -> str:
        name = f"{PROBE}{len(probes)}_"
        probes[name] = place
        return name

    for tool in probed.tools or []:
        function = tool.get("function", tool)
        function["name"] = probe("column 'tools': the chat template describes no tools")
    for index, message in enumerate(probed.messages):
        place = chat.place(index)
        for call in message.get("tool_calls", []):
            what = f"{place}.tool_calls: the chat template does not write every tool call"
            call["function"]["name"] = probe(what)
        if message["role"] == "tool":
            message["content"] = probe(f"{place}: the chat template writes no tool results")
    text = render(probed, encoder) if probes else ""
    missing = next((what for name, what in probes.items() if name not in text), None)
    if missing is None:
        return None
    return f"{missing}; use a model whose template has tools, or leave such rows out"


def refused(chat: Conversation, error: Exception) -> str:
    """The error of a template that rejects a conversation."""
    return f"{chat.column}: the chat template refuses them: {error}"


def marked(chat: Conversation, encoder: Encoder) -> Piece | str:
    """A conversation scored by the template's own marks."""
    try:
        text = render(chat, encoder)
        if problem := unwritten_tools(chat, encoder):
            return problem
        encoding: Any = encoder.tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
    except (TemplateError, TypeError, ValueError) as error:
        return refused(chat, error)
    ids, scored = encoding["input_ids"], np.array(encoding["assistant_masks"], dtype=np.bool_)
    scored[:1] = False
    size = covered_bytes(text, encoding["offset_mapping"], scored & ~special(ids, encoder))
    return piece(ids, scored, size)


def opened(chat: Conversation, encoder: Encoder) -> str:
    """A conversation up to where its next answer begins.

    Raises:
        BadRowError: The template cannot write it.
    """
    try:
        problem = unwritten_tools(chat, encoder)
        text = render(chat, encoder, open_answer=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRowError(refused(chat, error)) from error
    if problem:
        raise BadRowError(problem)
    return text


def special(ids: Sequence[int], encoder: Encoder) -> Bool[np.ndarray, " tokens"]:
    """Which tokens are special tokens of the template and stand for no text."""
    return np.isin(np.asarray(ids), list(encoder.special_ids))


def incremental(chats: Sequence[Conversation], encoder: Encoder) -> list[Piece | str]:
    """Conversations scored by rendering them turn by turn."""
    drafts = [turns(chat, encoder) for chat in chats]
    texts = [
        text
        for draft in drafts
        if not isinstance(draft, str)
        for text in (draft[0], *(part for turn in draft[1] for part in turn))
    ]
    encodings = iter(encoder.encode(texts, special=False))
    pieces: list[Piece | str] = []
    for chat, draft in zip(chats, drafts, strict=True):
        if isinstance(draft, str):
            pieces.append(draft)
            continue
        whole = next(encodings)
        spans = [(next(encodings), next(encodings)) for _ in draft[1]]
        scored = score_turns(draft[0], whole, spans, encoder)
        pieces.append(f"{chat.column}: {scored}" if isinstance(scored, str) else scored)
    return pieces


def turns(chat: Conversation, encoder: Encoder) -> tuple[str, list[Turn]] | str:
    """The whole conversation and its answers' borders as text, or why they are unknown."""
    found: list[Turn] = []
    try:
        whole = render(chat, encoder)
        if problem := unwritten_tools(chat, encoder):
            return problem
        for index, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            place = chat.place(index)
            if index == 0:
                return f"{place}: an assistant message must answer an earlier one, got none"
            before = render(first_messages(chat, index), encoder, open_answer=True)
            after = render(first_messages(chat, index + 1), encoder)
            turn: Turn | None = (before, after)
            if not after.startswith(before) or not whole.startswith(after):
                turn = located(chat, index, whole, encoder)
            if turn is None:
                return (
                    f"{place}: the chat template writes what came before differently "
                    "in a longer conversation, so the position of the answer is unknown; use a "
                    "template with {% generation %} marks"
                )
            found.append(turn)
    except (TemplateError, TypeError, ValueError) as error:
        return refused(chat, error)
    return whole, found


def located(chat: Conversation, index: int, whole: str, encoder: Encoder) -> Turn | None:
    """An answer's borders in a rendering that is no extension of the shorter ones.

    Some templates rewrite earlier turns: Qwen3's removes their reasoning. What the student reads is
    the rendering of the whole conversation, so the answer is located in that, by rendering it once
    more with a sentinel in the answer's place. An end-of-turn token after it belongs to it.

    Returns:
        None where the text around the sentinel is not the text around the answer, and for tool
        calls, which follow the content.
    """
    messages = chat.messages
    if messages[index].get("tool_calls") or SENTINEL in whole:
        return None
    other: Message = {"role": "assistant", "content": SENTINEL}
    changed = replace(chat, messages=[*messages[:index], other, *messages[index + 1 :]])
    text = render(changed, encoder)
    head, found, tail = text.partition(SENTINEL)
    end = len(whole) - len(tail)
    is_same = whole.startswith(head) and whole.endswith(tail) and end > len(head)
    if not found or not is_same:
        return None
    return whole[: len(head)], whole[: end + len(special_at_start(tail, encoder.tokenizer))]


def special_at_start(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The longest special token that a text begins with; empty where it begins with none."""
    added = backend_of(tokenizer).get_added_tokens_decoder().values()
    marks = [t.content for t in added if t.special and text.startswith(t.content)]
    return max(marks, key=len, default="")


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer, else the end token."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SENTINEL}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        text = ""
    mark = special_at_start(text.partition(SENTINEL)[2].lstrip(), tokenizer)
    return backend_of(tokenizer).token_to_id(mark) if mark else tokenizer.eos_token_id


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
                f"one token covers text inside and outside of answer {number}, so it is unclear "
                "which tokens are the answer; strip the white space around the answer, or use a "
                "template with {% generation %} marks"
            )
        scored[start : end_of_turn(text, whole, start, end, encoder)] = True
    scored[:1] = False
    has_text = scored & ~special(ids, encoder)
    return piece(ids, scored, covered_bytes(text, whole.offsets, has_text))


def end_of_turn(text: str, whole: Encoding, start: int, end: int, encoder: Encoder) -> int:
    """One past an answer's end-of-turn token; white space after it is not scored."""
    ids, offsets = whole.ids, whole.offsets
    last = next((i for i in range(end - 1, start - 1, -1) if ids[i] in encoder.special_ids), None)
    if last is None or text[offsets[last][1] : offsets[end - 1][1]].strip():
        return end
    return last + 1
