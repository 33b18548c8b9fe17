"""Docstrings and signatures as Markdown, for reference.py."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, ForwardRef

MODULES = {
    "limbeck": "DistillationLoss Run RunResult assemble load",
    "limbeck.losses": "Head Softcap Multiplied Divided TeacherSignal SignalPart SignalNeeds "
    "LogitTerm PairShapes StudentView",
    "limbeck.losses.distributions": "TeacherDistribution DenseLogits TopK",
    "limbeck.batch": "Batch",
    "limbeck.teachers": "Teacher TeacherInfo TeacherRequest",
    "limbeck.data": "BatchSource SourceContext StepData",
    "limbeck.evaluate.suites": "Suite SuiteContext",
    "limbeck.export": "export_student open_student HeldOutText",
    "limbeck.store": "Store sample_key",
}
"""Names for users, by module."""

SPECIAL = re.compile(r"[*<|\\]|(?<!\w)_|_(?!\w)")
"""What Markdown would read as emphasis, HTML or a cell's border."""


def python() -> str:
    """Public names of public modules, with signatures and docstrings."""
    parts = ["# Python", "Names for scripts, and for components of your own."]
    for path, names in MODULES.items():
        module = importlib.import_module(path)
        parts += [f"## `{path}`", prose(inspect.getdoc(module) or "").partition("\n\n")[0]]
        for name in names.split():
            parts += described(name, getattr(module, name), level=3)
    return "\n\n".join(parts)


def described(name: str, value: Any, level: int) -> list[str]:
    """A class or function: signature, docstring, and a class's public methods."""
    parts = [f"{'#' * level} `{name}`"]
    parts.append(f"```python\n{name.rpartition('.')[2]}{signature(value)}\n```")
    parts.append(docstring(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        own = vars(value).get("__init__")
        if own is not None and own.__doc__:
            parts.append(docstring(inspect.cleandoc(own.__doc__)))
        for key, method in vars(value).items():
            if not key.startswith("_") and inspect.isfunction(method) and method.__doc__:
                parts += described(f"{name}.{key}", method, level + 1)
    return [part for part in parts if part]


def signature(value: Any) -> str:
    """A signature on one line for each parameter, types as they are written in the code."""
    found = inspect.signature(value)
    parts, starred = [], False
    for each in found.parameters.values():
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not starred:
            parts, starred = [*parts, "*"], True
        default = "" if each.default is each.empty else f" = {default_words(each.default)}"
        parts.append(f"{each.name}: {annotation(each.annotation)}{default}")
    inside = ", ".join(parts)
    inside = "".join(f"\n    {part}," for part in parts) + "\n" if len(inside) > 60 else inside
    return f"({inside}) -> {annotation(found.return_annotation)}"


def annotation(hint: Any) -> str:
    """An annotation as it is written in the code."""
    if isinstance(hint, ForwardRef):
        hint = hint.__forward_arg__
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return re.sub(r"\b(?:limbeck|torch)\.(\w+\.)*", "", text).replace("'", '"')


def default_words(value: Any) -> str:
    """A parameter's default; `...` for one that is made anew for each call."""
    return repr(value) if isinstance(value, str | int | float | tuple | None) else "..."


def docstring(text: str) -> str:
    """A docstring in Markdown: `Args` and the like as lists, examples as code."""
    pieces = re.split(
        r"^(Args|Attributes|Example|Raises|Returns|Yields):\n", text, flags=re.MULTILINE
    )
    parts = [prose(pieces[0])]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if title == "Example":
            parts.append(
                f"```python\n{inspect.cleandoc(body)}\n```".replace("  # doctest: +SKIP", "")
            )
            continue
        entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", body, re.MULTILINE)
        lines = [f"- `{word}`: {' '.join(meaning.split())}" for word, meaning in entries]
        parts += [f"{title.replace('Args', 'Arguments')}:", "\n".join(lines) or prose(body)]
    return "\n\n".join(filter(None, parts))


def prose(text: str) -> str:
    """Lines joined to paragraphs; what Markdown would read as emphasis or HTML is escaped."""
    joined = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text))]
    pieces = re.split(r"(`[^`]*`)", "\n\n".join(joined))
    pieces[::2] = [SPECIAL.sub(r"\\\g<0>", piece) for piece in pieces[::2]]
    return "".join(pieces).replace("[bold]", "").strip()
