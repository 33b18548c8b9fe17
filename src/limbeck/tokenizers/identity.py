"""Hashes of tokenizers, and differences between chat templates."""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from limbeck.tokenizers.load import backend_of

EXAMPLE = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6."},
)
"""A chat on which two templates are compared."""


def serialisation(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Contents of a tokenizer.json, without the last call's truncation and padding."""
    whole: dict[str, Any] = json.loads(backend_of(tokenizer).to_str())
    return whole | {"truncation": None, "padding": None}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the whole tokenizer: vocabulary, merges, normaliser, splits and added tokens."""
    body = json.dumps(serialisation(tokenizer), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template; of None if there is none."""
    body = json.dumps(tokenizer.chat_template, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def template_difference(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> str | None:
    """Difference between the chat templates' output; None if there is none.

    Templates that differ as programs but render one example chat alike count as alike.
    """
    if student.chat_template == teacher.chat_template:
        return None
    if student.chat_template is None or teacher.chat_template is None:
        bare = "student" if student.chat_template is None else "teacher"
        return f"The {bare} has no chat template and the other model has one."
    ours, theirs = rendered(student), rendered(teacher)
    if ours == theirs:
        return None
    lines = difflib.unified_diff(
        theirs.splitlines(), ours.splitlines(), "teacher", "student", lineterm="", n=1
    )
    return "\n".join(
        [
            "The chat templates differ: the teacher reads chats in a form it was not trained on.",
            *lines,
        ]
    )


def rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The example chat rendered by a tokenizer's template, or the error."""
    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in EXAMPLE], tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        return f"(cannot be rendered: {error})"
