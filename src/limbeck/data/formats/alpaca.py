"""`alpaca`: an instruction, an input and an output, as a conversation of one turn."""

from __future__ import annotations

from typing import ClassVar

from limbeck.data.formats import Values, readers
from limbeck.data.formats.chat import Dialogue
from limbeck.data.formats.messages import Conversation, optional_text, read_message


@readers.register("alpaca")
class Alpaca(Dialogue):
    """Columns `instruction`, `input` and `output`; only the output is scored."""

    title: ClassVar[str] = "Alpaca"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "output")
    optional: ClassVar[tuple[str, ...]] = ("input", "system")
    answer: ClassVar[str | None] = "output"

    def conversation(self, values: Values) -> Conversation:
        """A user message of instruction, blank line and input; the output answers it."""
        turns = [
            ("user", "instruction", values["instruction"]),
            ("assistant", "output", values["output"]),
        ]
        system = optional_text(values.get("system"), "column 'system'")
        if system:
            turns.insert(0, ("system", "system", system))
        messages = [
            read_message({"role": role, "content": text}, f"column {column!r}")
            for role, column, text in turns
        ]
        if given := optional_text(values.get("input"), "column 'input'"):
            messages[-2]["content"] += f"\n\n{given}"
        return Conversation(messages)
