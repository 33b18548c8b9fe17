"""`sharegpt`: conversations of `from` and `value`."""

from __future__ import annotations

from typing import ClassVar

from limbeck.data.formats import Values, readers
from limbeck.data.formats.chat import Dialogue
from limbeck.data.formats.messages import (
    BadRowError,
    Conversation,
    optional_text,
    read_messages,
    read_tools,
)


@readers.register("sharegpt")
class ShareGPT(Dialogue):
    """Column `conversations`, a list of `{from, value}`; only `gpt`'s turns are scored."""

    title: ClassVar[str] = "ShareGPT"
    columns: ClassVar[tuple[str, ...]] = ("conversations",)
    optional: ClassVar[tuple[str, ...]] = ("system", "tools")

    def conversation(self, values: Values) -> Conversation:
        """The messages, after the column `system` where a row has one."""
        messages = read_messages(values["conversations"], "conversations")
        system = optional_text(values.get("system"), "column 'system'")
        if system and messages[0]["role"] == "system":
            raise BadRowError(
                "column 'system' must be empty where conversations[0] is a system message too"
            )
        first = [{"role": "system", "content": system}] if system else []
        tools = read_tools(values.get("tools"))
        return Conversation([*first, *messages], tools, "conversations", len(first))
