"""Writes the pages of docs/reference from the code: `python docs/reference.py`.

They are committed, so that they can be read without the site; tests/test_reference.py fails when
they differ from the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen
from docstrings import prose, python

from limbeck import errors
from limbeck.commands import GROUPS, VERBS, load_verb
from limbeck.config import RunConfig
from limbeck.config.json_schema import properties_of
from limbeck.config.schedules import Schedule, Scheduled
from limbeck.data import readers
from limbeck.experiment.loading import OPEN_PARTS
from limbeck.export.base import exporters
from limbeck.registry import Component, Registry, registry_of

FOLDER = Path(__file__).parent / "reference"
NOTICE = "<!-- Written by docs/reference.py from the code. -->\n"
NOTHING = object()

KINDS: dict[str, tuple[str, Registry[Any]]] = {
    "Teachers": ("`teacher` in a recipe.", OPEN_PARTS["teacher"]),
    "Students": ("`student` in a recipe.", OPEN_PARTS["student"]),
    "Divergences": (
        "`objective.divergence` in a recipe. p is the teacher's distribution, q the student's; the "
        "value is of one token.",
        OPEN_PARTS["objective.divergence"],
    ),
    "Terms": (
        "`objective.extra` in a recipe is a list of them. Each also takes `weight` (a number, at "
        "least 0; required) and `name`, under which metrics show it (its type by default).",
        OPEN_PARTS["objective.extra[]"],
    ),
    "Positions": (
        "`objective.positions` in a recipe: where logits are compared.",
        OPEN_PARTS["objective.positions"],
    ),
    "Data types": (
        "`data.type` in a recipe. [Data](../data.md) has an example of each.",
        readers,
    ),
    "Batch sources": ("`data.source` in a recipe.", OPEN_PARTS["data.source"]),
    "Evaluation suites": (
        "`evaluate.suites` in a recipe is a list of them.",
        OPEN_PARTS["evaluate.suites[]"],
    ),
    "Trackers": ("`track` in a recipe is a list of them.", OPEN_PARTS["track[]"]),
    "Store forms": (
        "`record.form` in a recipe: what a store keeps of each distribution.",
        OPEN_PARTS["record.form"],
    ),
    "Export formats": ("Of `limbeck export`.", exporters),
}
"""By heading: where the components stand in a recipe, and their registry."""

BOUNDS = {Gt: "greater than", Ge: "at least", Lt: "less than", Le: "at most"}
PLAIN = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    Path: "path",
    Any: "any value",
    type(None): "`null`",
    Component: "mapping",
}


def pages() -> dict[str, str]:
    """Contents of every page, by file name."""
    written = {
        "recipe.md": recipe(),
        "components.md": components(),
        "commands.md": commands(),
        "python.md": python(),
    }
    return {name: f"{NOTICE}\n{text.rstrip()}\n" for name, text in written.items()}


def recipe() -> str:
    """Every option of a recipe."""
    parts = [
        "# Options of a recipe",
        "A recipe is a YAML file. `limbeck distill recipe.yaml optim.steps=100` changes an option "
        "on the command line, and `limbeck check --schema` prints all of them as a JSON schema, "
        "for editors. `stages` holds a list of runs "
        "([Stages](../stages.md)).",
        *section("", RunConfig),
    ]
    return "\n\n".join(parts)


def section(at: str, config: type) -> Iterator[str]:
    """The options of a section, then the sections inside it."""
    described = properties_of(config)
    hints = get_type_hints(config, include_extras=True)
    inner = []
    for field, (name, facts) in zip(dataclasses.fields(config), described.items(), strict=True):
        path, hint = f"{at}{name}", hints[field.name]
        nested = section_of(hint)
        if nested is not None:
            path += "[]" if get_origin(hint) is tuple else ""
            inner.append((path, nested, facts.get("description", ""), is_optional(hint)))
            continue
        yield option(path, hint, default_of(field), facts.get("description", ""))
    for path, nested, text, optional in inner:
        words = [f"## `{path}`", prose(inspect.getdoc(nested) or ""), text]
        words.append("A recipe needs no such section." if optional else "")
        yield "\n\n".join(filter(None, words))
        yield from section(f"{path}.", nested)


def option(path: str, hint: Any, default: Any, text: str) -> str:
    """A heading, the type with its bounds and default, and the meaning."""
    title = path.removesuffix("[]")
    opened = next((r for key, r in OPEN_PARTS.items() if key.removesuffix("[]") == title), None)
    words = type_words(hint)
    if opened is not None:
        heading = next(name for name, (_, registry) in KINDS.items() if registry is opened)
        link = f"[{heading.lower()}](components.md#{heading.lower().replace(' ', '-')})"
        words = f"list of {link}" if f"{title}[]" in OPEN_PARTS else f"one of the {link}"
    assert text, f"{path} has no docstring"
    required = default is NOTHING
    ending = "required" if required else f"default {shown(default)}"
    return f"### `{path}`\n\n*{words}; {ending}*\n\n{prose(text)}".rstrip()


def components() -> str:
    """Every component of every registry."""
    parts = [
        "# Components",
        "A component is written as its name, or as `{type: name, option: value}`. Options without "
        "a default are required. [Extending limbeck](../extending.md) shows how to add your own.",
    ]
    for heading, (text, registry) in KINDS.items():
        parts += [f"## {heading}", text]
        for name in registry.names():
            parts.append(component(registry, name))
    return "\n\n".join(parts)


def component(registry: Registry[Any], name: str) -> str:
    """A component with its options."""
    explained = registry.explain(name)
    lines = [f"### `{name}`", f"{explained.summary}\n\n{prose(explained.details)}".rstrip()]
    rows = []
    for key, (hint, parameter) in registry.options(name).items():
        required = parameter.default is parameter.empty
        default = "required" if required else shown(parameter.default)
        meaning = prose(explained.options[key])
        rows.append(f"| `{key}` | {type_words(hint)} | {default} | {meaning} |")
    if rows:
        head = ["| option | type | default | meaning |", "|---|---|---|---|"]
        lines.append("\n".join(head + [row.replace("\\|", "|") for row in rows]))
    return "\n\n".join(lines)


def commands() -> str:
    """Every verb with its arguments and options, and the exit codes."""
    parts = [
        "# Commands",
        "`limbeck VERB --help` prints the same. Arguments come first, then options; changes to a "
        "recipe are `key.sub=value`, each value in YAML.",
    ]
    for verb in VERBS:
        command = load_verb(verb)
        if verb not in GROUPS:
            parts += verb_page(f"limbeck {verb}", command)
            continue
        parts += [f"## `limbeck {verb}`", command.help or ""]
        for name, each in command.commands.items():
            parts += verb_page(f"limbeck {verb} {name}", each)
    parts += ["## Exit codes", exit_codes()]
    return "\n\n".join(parts)


def verb_page(title: str, command: Any) -> list[str]:
    """A verb's usage, explanation, arguments and options."""
    usage = " ".join(command.collect_usage_pieces(typer.Context(command, info_name=title)))
    rows = []
    for each in command.params:
        if each.param_type_name == "argument":
            name, ending = f"`{(each.metavar or each.name.upper()).replace('|', 'or')}`", ""
        elif "--help" in each.opts:
            continue
        else:
            name = ", ".join(f"`{n}`" for n in [*each.opts, *each.secondary_opts])
            given = each.default not in (None, False, ())
            ending = " Required." if each.required else ""
            ending += f" Default: {shown(each.default)}." if given else ""
        words = "" if getattr(each, "is_flag", False) else value_words(each)
        rows.append(f"| {name} | {words} | {prose(each.help or '')}{ending} |")
    parts = [f"## `{title}`", f"```\n{title} {usage}\n```", prose(command.help or "")]
    if rows:
        parts.append(
            "\n".join(["| argument or option | value | meaning |", "|---|---|---|", *rows])
        )
    return parts


def value_words(parameter: Any) -> str:
    """The value an argument or option takes, with its bounds."""
    bounds = [(Ge, parameter.min), (Le, parameter.max)]
    limits = " and ".join(f"{BOUNDS[kind]} {value}" for kind, value in bounds if value is not None)
    words = type_words(parameter.type_descriptor.annotation).removesuffix(" or `null`")
    return f"{words} {limits}".rstrip()


def exit_codes() -> str:
    """The table of exit codes, from the errors."""
    rows = {"0": "Done."}
    for error in vars(errors).values():
        if (
            inspect.isclass(error)
            and "exit_code" in vars(error)
            and error is not errors.LimbeckError
        ):
            rows[str(error.exit_code)] = inspect.getdoc(error) or ""
    rows["130"] = "Ctrl-C; the run was saved first."
    rows["143"] = "SIGTERM; the run was saved first. Other signals: 128 and the signal's number."
    ordered = sorted(rows.items(), key=lambda row: int(row[0]))
    return "\n".join(
        ["| code | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in ordered)]
    )


def type_words(hint: Any) -> str:
    """A type with its bounds, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None or hint == Component:
        return PLAIN[hint]
    if origin is Annotated:
        return annotated(arguments[0], arguments[1:])
    if origin is Literal:
        return listed([f"`{value}`" for value in arguments])
    if origin in (Union, types.UnionType):
        rest = [each for each in arguments if each is not Schedule]
        return " or ".join(dict.fromkeys(map(type_words, rest))).replace(
            " or `null`", ", or `null`"
        )
    if origin in (tuple, list) and (origin is list or Ellipsis in arguments):
        return re.sub(
            r"list of (mapping|path|text|(?:whole )?number)",
            r"list of \1s",
            f"list of {type_words(arguments[0])}",
        )
    if origin is tuple:
        return f"[{', '.join(map(type_words, arguments))}]"
    assert issubclass(origin, Mapping), f"no words for {hint}"
    return f"mapping of {type_words(arguments[0])} to {type_words(arguments[1])}"


def listed(words: list[str]) -> str:
    """Words as a list in a sentence."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def annotated(base: Any, extras: tuple[Any, ...]) -> str:
    """A type with bounds; a registry's components; a number that may follow a schedule."""
    registry = registry_of(Annotated[(base, *extras)])
    if registry is not None:
        return f"a {registry.kind}"
    words, limits = type_words(base), []
    for extra in extras:
        if isinstance(extra, Scheduled):
            scheduled = annotated(float, (extra.bounds,))
            return f"{scheduled}, or a schedule of such numbers"
        parts = list(extra) if isinstance(extra, Interval) else [extra]
        for kind, text in BOUNDS.items():
            limits += [
                f"{text} {getattr(p, kind.__name__.lower()):g}" for p in parts if type(p) is kind
            ]
        if isinstance(extra, MinLen):
            limits.append("not empty")
    return f"{words} {' and '.join(limits)}".rstrip()


def section_of(hint: Any) -> type | None:
    """The dataclass of a section, if an option is one."""
    for each in (hint, *get_args(hint)):
        if dataclasses.is_dataclass(each) and isinstance(each, type) and each is not Schedule:
            return each
    return None


def is_optional(hint: Any) -> bool:
    """Whether an option may be null."""
    return type(None) in get_args(hint)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or `NOTHING`."""
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return NOTHING


def shown(value: Any) -> str:
    """A default as a recipe writes it."""
    words: Mapping[Any, str] = {None: "`null`", True: "`true`", False: "`false`", (): "`[]`"}
    if value is None or isinstance(value, bool) or value == ():
        return words[value]
    if value == "":
        return "empty"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{dict(value) if isinstance(value, Mapping) else value}`"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, contents in pages().items():
        (FOLDER / file).write_text(contents)
