"""Seeds one bug after another, and sees whether the law that should catch it does.

    python benchmarks/mutations.py [--only WORD] [--results benchmarks/results]

Works on a copy of the tree in a temporary directory. A bug counts as caught when its test fails;
a test that cannot be collected, or a bug whose text is not found exactly once, is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
TREES = ("src", "tests", "docs", "recipes", "benchmarks")


class Verdict(NamedTuple):
    """What came of one bug."""

    mutation: Mutation
    text: str


def copy_tree(place: Path) -> None:
    """Copy what the tests need, and no caches."""
    for name in TREES:
        shutil.copytree(
            ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(ROOT / "pyproject.toml", place)


def run_test(place: Path, tests: list[str]) -> int:
    """Exit code of pytest in the copy: 0 green, 1 red, more where it could not run."""
    environment = os.environ | {
        "PYTHONPATH": str(place / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    finished = subprocess.run(
        [*command, *tests], cwd=place, env=environment, capture_output=True, check=False
    )
    return finished.returncode


def verdicts(place: Path, chosen: list[Mutation]) -> Iterator[Verdict]:
    """Patch, test and mend, one bug at a time."""
    for mutation in chosen:
        path = place / "src" / "limbeck" / mutation.file
        whole = path.read_text(encoding="utf-8")
        if whole.count(mutation.old) != 1:
            yield Verdict(mutation, f"error: its text is there {whole.count(mutation.old)} times")
            continue
        path.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
        code = run_test(place, [f"tests/{mutation.test}"])
        path.write_text(whole, encoding="utf-8")
        names = {0: "missed", 1: "caught"}
        yield Verdict(mutation, names.get(code, f"error: pytest ended with {code}"))


def report(found: list[Verdict], seconds: float) -> str:
    """The table as Markdown."""
    caught = sum(verdict.text == "caught" for verdict in found)
    lines = [
        "# Bugs seeded, and the laws that caught them",
        "",
        f"{caught} of {len(found)} caught, in {seconds:.0f} s, by `benchmarks/mutations.py`;",
        "each test was green on the same copy without the bug.",
        "",
        "| bug | file | test | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {v.mutation.bug} | `{v.mutation.file}` | `{v.mutation.test}` | {v.text} |"
        for v in found
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the table; 1 if a bug was not caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word of the test's or the file's name")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only in m.test or arguments.only in m.file]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        copy_tree(place)
        if run_test(place, sorted({f"tests/{m.test}" for m in chosen})) != 0:
            print("The tests are not green without a bug; nothing can be learnt.")
            return 1
        found = []
        for verdict in verdicts(place, chosen):
            found.append(verdict)
            print(f"{verdict.text:8} {verdict.mutation.test}: {verdict.mutation.bug}", flush=True)
    if not arguments.only:
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / "mutations.md"
        path.write_text(report(found, time.perf_counter() - started), encoding="utf-8")
    return int(any(verdict.text != "caught" for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
