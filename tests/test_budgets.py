"""The house stays small enough to live in: budgets on files, functions and parameters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def functions():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, FUNCTION):
                yield path, node


def test_the_source_files_are_found():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_a_function_has_at_most_60_lines():
    long = [
        f"{path.name}:{node.name} {node.end_lineno - node.lineno + 1}"
        for path, node in functions()
        if node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


def test_a_function_takes_at_most_8_parameters_by_position():
    wide = [
        f"{path.name}:{node.name}"
        for path, node in functions()
        if len(node.args.posonlyargs + node.args.args) - (node.args.args[:1] != []) > 8
    ]
    assert not wide


def test_nothing_reads_or_writes_pickle():
    """A planted pickle runs code when it is read; nothing here may ever read one."""
    banned = ("import pickle", "torch.save(", "torch.load(", "dill", "allow_pickle=True")
    found = [
        f"{path.name}: {word}" for path in SOURCES for word in banned if word in path.read_text()
    ]
    assert not found


def test_only_the_listed_packages_import_transformers_and_torch_distributed():
    """The loss core is a library in its own right; floors cannot say this, so it is said here."""
    rooms = {
        "transformers": {"models", "prune", "tokenizers", "data", "rollouts", "train", "export"},
        "torch.distributed": {"distributed", "train"},
    }
    for library, allowed in rooms.items():
        for path in SOURCES:
            room = path.relative_to(ROOT / "src" / "limbeck").parts[0]
            text = path.read_text()
            imports = f"import {library}" in text or f"from {library}" in text
            assert not imports or room in allowed, f"{path} imports {library}"


def test_every_seeded_bug_fits_the_source_and_names_a_test():
    command = [sys.executable, str(ROOT / "benchmarks" / "mutations.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
