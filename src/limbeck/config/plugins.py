"""Plugins: Python files and installed packages that register components of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from limbeck.registry import Problem

GROUP = "limbeck.plugins"
"""Entry-point group of packages whose components are known wherever they are installed."""


def import_plugins(files: Sequence[Path]) -> Iterator[Problem]:
    """Import installed plugins, then a recipe's files, each once in a process.

    Yields:
        A problem for every plugin that cannot be imported.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # the package's own code, which may raise anything
            found = f"{point.name} = {point.value}"
            yield Problem("plugins", f"the installed plugin {found} fails: {reason(error)}.")
    for index, path in enumerate(files):
        at = f"plugins[{index}]"
        if not path.is_file():
            yield Problem(
                at, f"must be a Python file, and {path} is none. Paths are relative to the recipe."
            )
            continue
        try:
            import_file(path)
        except Exception as error:  # the user's own code, which may raise anything
            yield Problem(at, f"{path}{line_of(error, path)}: {reason(error)}.")


def import_file(path: Path) -> None:
    """Import a Python file under a name derived from its path, unless that was done before."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"limbeck_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and get_type_hints look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def line_of(error: Exception, path: Path) -> str:
    """The last line of the file that was running, as `, line 3`."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def reason(error: Exception) -> str:
    """Type and message of an error, in one line."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(message.split())}".rstrip(".")
