"""`limbeck chat`: talk to a student, beside its teacher."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from limbeck.commands.arguments import Device, RemoteCode, argument, option
from limbeck.commands.chat_window import ChatWindow
from limbeck.commands.conversation import ChatSession, Settings
from limbeck.commands.opening import open_models
from limbeck.errors import ConfigError, LimbeckError, Stopped
from limbeck.models.source import student_inside

HELP = """/temperature 0.7   sampling temperature; 0 takes the most probable token
/top-p 0.9         sample from the most probable tokens that together reach this probability
/tokens 512        longest answer
/system TEXT       another system message, in a new conversation; without TEXT, none
/retry             answer the last message again
/clear             a new conversation
/save FILE         append the conversation to a .jsonl file, as data.type: chat reads it
/quit              exit (or Ctrl-D); Ctrl-C stops an answer"""

ROLES = ("student", "teacher")
Count = Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")]


def chat(
    student: Annotated[str, argument(help="Folder, run directory, hub name or .gguf.")],
    teacher: Annotated[str | None, argument(help="A model with the same vocabulary.")] = None,
    *,
    system: Annotated[str | None, option(help="System message.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
    ] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.95,
    tokens: Count = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    revision: Annotated[
        list[str] | None, typer.Option(help="Revision of the student; repeat for the teacher.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    device: Device = "auto",
) -> None:
    """Talk to a student in the terminal, beside its teacher.

    With a teacher both answer, and each token of the student is coloured by how improbable the
    teacher finds it. The conversation continues from the student's answers. Messages are rendered
    by the chat template, the teacher's where there is one; without a template each message is
    continued as plain text.

    Lines that are piped in are messages: echo "What boils?" | limbeck chat runs/x

    Examples: limbeck chat runs/x; limbeck chat runs/x/student Qwen/Qwen2.5-7B-Instruct
    """
    settings = Settings(temperature, top_p, tokens, seed)
    paths = [str(student_inside(Path(student)) or student)]
    paths += [] if teacher is None else [teacher]
    console = Console()
    with Console(stderr=True).status("Loading ..."):
        # The teacher comes first there.
        revisions = [*(revision or []), None, None][: len(paths)]
        models, tokenizer = open_models(paths[::-1], revisions[::-1], trust_remote_code, device)
    named = dict(zip(ROLES, models[::-1], strict=False))
    conversation = ChatSession(named, tokenizer, settings, system)
    window = ChatWindow(console, dict(zip(ROLES, paths, strict=False)))
    window.begin(has_template=conversation.has_template)
    for line in messages(console):
        try:
            if not line.startswith("/"):
                window.show(conversation.answer(line, window.stream))
            elif not command(line, conversation, window):
                return
        except Stopped as stop:
            if stop.exit_code != 128 + signal.SIGINT:
                raise
            window.say("interrupted")
        except LimbeckError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
        finally:
            window.stop()


def messages(console: Console) -> Iterator[str]:
    """Lines that a user types, or that are piped in; empty ones are left out."""
    while True:
        try:
            line = console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def command(line: str, conversation: ChatSession, window: ChatWindow) -> bool:
    """Carry out a line that begins with a slash; False ends the chat.

    Raises:
        ConfigError: There is no such command, or its value is wrong.
    """
    name, _, value = line.partition(" ")
    value = value.strip()
    match name:
        case "/quit" | "/exit":
            return False
        case "/help":
            window.say(HELP)
        case "/temperature" | "/top-p" | "/tokens":
            conversation.settings = conversation.settings.changed(name[1:], value)
            window.say(str(conversation.settings))
        case "/system":
            conversation.begin(value or None)
            window.say("A new conversation.")
        case "/clear":
            conversation.begin(conversation.system)
            window.say("A new conversation.")
        case "/retry":
            window.show(conversation.retry(window.stream))
        case "/save":
            conversation.save(value)
            window.say(f"Appended to {value}.")
        case _:
            raise ConfigError(f"There is no command {name}. /help lists all of them.")
    return True
