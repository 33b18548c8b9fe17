"""Paths of models and texts, looked at on this machine before a model library is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from limbeck.errors import ConfigError, DataError, LimbeckError, TryLaterError
from limbeck.files import expanded
from limbeck.registry import Component, Problem

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Files of rows."""
TEXT_SUFFIXES = (".txt", ".md")
"""Files that are one text each."""
ALL_SUFFIXES = (*SUFFIXES, *TEXT_SUFFIXES)

MODELS = ("online", "pretrained")
"""Types of teachers and students whose `path` is a model."""

NamedModel = tuple[str, Component]
"""A component with a model's `path`, and its place in the recipe."""

SWITCHES_OFF = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables that keep the Hugging Face libraries from the network."""


def missing_model(path: str) -> str:
    """Why no model can be opened at a path; empty where one may be, here or on the hub."""
    here = expanded(path)
    if here.suffix == ".gguf" or here.is_file():
        if here.suffix == ".gguf" and here.is_file():
            return ""
        return (
            f"A model must be a folder, a .gguf file that exists or a hub name, got {here}. Check "
            "the path."
        )
    if here.is_dir():
        if (here / "config.json").is_file():
            return ""
        return (
            f"A model's folder must hold config.json, but {here} does not. Give the folder that "
            "save_pretrained wrote."
        )
    if not is_hub_name(path):
        return f"There must be a model at {here}, but there is no such folder or file."
    return ""


def is_hub_name(path: str) -> bool:
    """Whether a path that is not here may be a model's name on the hub.

    Example:
        >>> [is_hub_name(p) for p in ("gpt2", "Qwen/Qwen2.5-7B", "./here", "a/b/c", "x.gguf")]
        [True, True, False, False, False]
    """
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None
    return is_name and not path.startswith((".", "~")) and not path.endswith(".gguf")


def missing_text(path: str) -> str:
    """Why no text can be read at a path; empty where one may be, here or on the hub."""
    if expanded(path).exists() or may_be_on_hub(path):
        return ""
    return f"{path} must exist, and does not. Check the path."


def may_be_on_hub(path: str) -> bool:
    """Whether a path that is not here may name a data set on the Hugging Face hub."""
    is_file = path.startswith((".", "/", "~")) or path.endswith(ALL_SUFFIXES) or path.count("/") > 1
    return not is_file


def is_out_of_reach(name: str, revision: str | None) -> bool:
    """Whether a model is on the hub only, and the network is switched off."""
    is_off = any(os.environ.get(switch) for switch in SWITCHES_OFF)
    if not is_off or not is_hub_name(name) or expanded(name).exists():
        return False
    from huggingface_hub import constants, try_to_load_from_cache  # noqa: PLC0415  (takes 0.2 s)

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return constants.HF_HUB_OFFLINE and not isinstance(found, str)


def not_cached(name: str, revision: str | None) -> str:
    """The message for a hub model that is neither in the cache nor within reach."""
    return (
        f"{name!r} (revision {revision or 'main'}) is no folder here, is not in the local cache, "
        "and the Hugging Face hub is out of reach or busy. Give the folder of a downloaded model, "
        "or start again later."
    )


def models_in(spec: Any, at: str) -> Iterator[NamedModel]:
    """The components with a model's `path` in a teacher or student, each with its place.

    Example:
        >>> dict(models_in({"teachers": [{"type": "online", "path": "a"}]}, "t"))
        {'t.teachers[0].path': {'type': 'online', 'path': 'a'}}
    """
    if isinstance(spec, Mapping):
        if spec.get("type") in MODELS and isinstance(spec.get("path"), str):
            yield f"{at}.path", spec
        parts = [(f"{at}.{name}", value) for name, value in spec.items()]
    elif isinstance(spec, list | tuple):
        parts = [(f"{at}[{index}]", value) for index, value in enumerate(spec)]
    else:
        return
    yield from chain.from_iterable(models_in(value, place) for place, value in parts)


def models_of(sections: Mapping[str, Any], *, student: bool) -> list[NamedModel]:
    """The components in a recipe's sections that have a model's `path`, each with its place."""
    found = list(models_in(sections.get("teacher"), "teacher"))
    return found + (list(models_in(sections.get("student"), "student")) if student else [])


def texts_of(sections: Mapping[str, Any], *, held_out: bool) -> Iterator[tuple[str, str]]:
    """The paths of the texts in a recipe's sections, each with its option."""
    if (data := sections.get("data")) is not None:
        for index, text in enumerate(data.texts):
            yield (f"data.mix[{index}].path" if data.mix else "data.path"), text.path
    if held_out and (evaluate := sections.get("evaluate")) is not None:
        for name, path in evaluate.paths.items():
            yield (f"evaluate.data.{name}" if name else "evaluate.data"), path


def path_problems(
    models: Iterable[NamedModel], texts: Iterable[tuple[str, str]]
) -> dict[type[LimbeckError], list[Problem]]:
    """What is not there, by the error it is; the errors in the order in which one is raised.

    Args:
        models: Components with a model's `path`, each with its place.
        texts: Paths, each with its option.
    """
    found: dict[type[LimbeckError], list[Problem]] = {
        kind: [] for kind in (ConfigError, DataError, TryLaterError)
    }
    for at, spec in models:
        name = spec["path"]
        if reason := missing_model(name):
            found[ConfigError].append(Problem(at, reason))
        elif is_out_of_reach(name, spec.get("revision")):
            found[TryLaterError].append(Problem(at, not_cached(name, spec.get("revision"))))
    for at, path in texts:
        here = expanded(path)
        if reason := missing_text(path) if path else "":
            found[ConfigError].append(Problem(at, reason))
        elif here.is_file() and not here.stat().st_size:
            found[DataError].append(Problem(at, f"{path} must hold rows, and is empty."))
    return found
