"""Messages of a conversation, converted from stored formats to the one chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.data.formats import text_problem

ROLES = ("system", "developer", "user", "assistant", "tool")

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
"""ShareGPT's speakers that have another name in a template."""

Message = dict[str, Any]


class BadRowError(ValueError):
    """A row that cannot be used; its text begins with the place in the row."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as a chat template reads it.

    Attributes:
        messages: `role`, `content` (text) and further keys of the row, such as `tool_calls`.
        tools: Descriptions of the tools, for the template's argument of that name.
        column: Column of the messages.
        added: Number of messages inserted before those of the column.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    column: str = "messages"
    added: int = 0

    def place(self, index: int) -> str:
        """Where a message is in its row, as `messages[2]`."""
        return f"{self.column}[{index - self.added}]"


def read_messages(value: object, column: str) -> list[Message]:
    """Messages of `{role, content}` or ShareGPT's `{from, value}`."""
    if not isinstance(value, list) or not value:
        raise BadRowError(f"column {column!r} must be a list of messages that is not empty")
    return [read_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def read_message(message: object, place: str) -> Message:
    """A message with its content as text and its tool calls parsed; null values are dropped."""
    if not isinstance(message, dict):
        raise BadRowError(
            f"{place} must be a mapping with role and content, got {type(message).__name__}"
        )
    key, names = "role", list(ROLES)
    if "role" not in message and {"from", "value"} <= message.keys():
        speaker = str(message["from"])
        message = {"role": SPEAKERS.get(speaker, speaker), "content": message["value"]}
        key, names = "from", [*SPEAKERS, *ROLES]
    role = message.get("role")
    if role not in ROLES:
        raise BadRowError(f"{place}.{key} must be one of {', '.join(names)}, got {role!r}")
    if message.get("function_call"):
        raise BadRowError(
            f"{place}.function_call is an older form that is not read; write it as tool_calls"
        )
    calls = read_tool_calls(message.get("tool_calls"), f"{place}.tool_calls")
    content = message.get("content")
    text = "" if calls and not content else read_content(content, f"{place}.content")
    rest = {k: v for k, v in message.items() if v is not None and k != "tool_calls"}
    return rest | {"content": text} | ({"tool_calls": calls} if calls else {})


def read_content(content: object, place: str) -> str:
    """The text of a message: a string, or OpenAI's list of parts, text parts only."""
    if isinstance(content, list) and content:
        content = "".join(read_part(part, f"{place}[{i}]") for i, part in enumerate(content))
    if problem := text_problem(content, place):
        raise BadRowError(problem)
    return str(content)


def read_part(part: object, place: str) -> str:
    """The text of a content part."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind != "text":
        raise BadRowError(f"{place} must be a text part, the only kind that is read, got {kind!r}")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRowError(f"{place}.text must be a string, got {type(text).__name__}")
    return text


def read_tool_calls(calls: object, place: str) -> list[Any]:
    """OpenAI's tool calls, their arguments parsed: templates write arguments as JSON themselves."""
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadRowError(f"{place} must be a list, got {type(calls).__name__}")
    return [read_tool_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def read_tool_call(call: object, place: str) -> dict[str, Any]:
    """One call, as `{id?, type, function: {name, arguments}}`."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise BadRowError(f"{place} must be a mapping with a function, got {str(call)[:40]!r}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise BadRowError(f"{place}.function.name must be a string, got {name!r}")
    if isinstance(arguments, str):
        arguments = read_json(arguments or "{}", f"{place}.function.arguments")
    if not isinstance(arguments, Mapping | None):
        raise BadRowError(
            f"{place}.function.arguments must be a JSON object, got {type(arguments).__name__}"
        )
    identity = {"id": call["id"]} if call.get("id") else {}
    return identity | {
        "type": "function",
        "function": {"name": name, "arguments": dict(arguments or {})},
    }


def read_tools(value: object) -> list[Any] | None:
    """The column `tools`: descriptions of functions, as a list or as its JSON; None for none."""
    tools = read_json(value, "column 'tools'") if isinstance(value, str) and value else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError(f"column 'tools' must be a list of mappings, got {str(value)[:40]!r}")
    return tools


def read_json(text: str, place: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{place} must be JSON, got {text[:40]!r}: {error}") from None


def optional_text(value: object, name: str) -> str:
    """The text of a column that may be absent, null or empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if problem := text_problem(value, name):
        raise BadRowError(problem)
    return str(value)
