"""Seeds one bug after another, and sees whether the law that should catch it does.

    python benchmarks/mutations.py [--check] [--only WORD] [--since COMMIT]

Each bug runs its own test in a copy of the tree, in a process forked from one that has loaded torch
already. A bug counts as caught when its test fails; a test that cannot be collected, or a bug whose
text is not found exactly once, is an error. `--check` only looks whether every bug still fits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
TREES = ("src", "tests", "docs", "recipes", "benchmarks")
PYTEST = (
    *("-q", "-x", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider"),
    *("-o", "addopts=--jaxtyping-packages=limbeck,beartype.beartype --import-mode=importlib"),
)


class Verdict(NamedTuple):
    """What came of one bug."""

    mutation: Mutation
    text: str


def misfit(mutation: Mutation) -> str | None:
    """Why a bug cannot be seeded, or its test not run, if so."""
    source = ROOT / "src/limbeck" / mutation.file
    if not source.is_file():
        return "the file is not there"
    times = source.read_text(encoding="utf-8").count(mutation.old)
    if times != 1:
        return f"its text is there {times} times"
    path, _, name = mutation.test.partition("::")
    test = ROOT / "tests" / path
    if not test.exists() or f"def {name.partition('[')[0]}(" not in test.read_text("utf-8"):
        return "its test is not there"
    return None


def copy_tree(place: Path) -> None:
    """Copy what the tests need, and no caches."""
    for name in TREES:
        shutil.copytree(
            ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(ROOT / "pyproject.toml", place)


def run_tests(place: Path, tests: list[str]) -> int:
    """Exit code of pytest in the copy: 0 green, 1 red, more where it could not run.

    It ends as the process does: what it imports must never be imported again.
    """
    import pytest  # noqa: PLC0415

    multiprocessing.current_process().daemon = False  # so that tests may start ranks
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a bug may leave it unheeded, which ends a worker
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(place / "src")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(place / "src"))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    return int(pytest.main([*PYTEST, *tests]))


def verdict(mutation: Mutation) -> Verdict:
    """Seed a bug in a copy, and run its test."""
    problem = misfit(mutation)
    if problem is not None:
        return Verdict(mutation, f"error: {problem}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        copy_tree(place)
        path = place / "src" / "limbeck" / mutation.file
        whole = path.read_text(encoding="utf-8")
        path.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
        code = run_tests(place, [f"tests/{mutation.test}"])
        os.chdir(ROOT)
    names = {0: "missed", 1: "caught"}
    return Verdict(mutation, names.get(code, f"error: pytest ended with {code}"))


def without_bug(tests: list[str]) -> int:
    """How some tests end when nothing is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        code = run_tests(Path(folder), [f"tests/{test}" for test in tests])
        os.chdir(ROOT)
    return code


def report(found: list[Verdict], seconds: float) -> str:
    """The table as Markdown."""
    caught = sum(each.text == "caught" for each in found)
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


def tests_file(mutation: Mutation) -> str:
    """Where the test stands that should turn red."""
    return "tests/" + mutation.test.partition("::")[0]


def changed_since(commit: str) -> set[str]:
    """Files that are not as they were."""
    command = ["git", "diff", "--name-only", commit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def check() -> int:
    """Name every bug that fits no more; 1 if there is one."""
    problems = [(each, misfit(each)) for each in MUTATIONS]
    wrong = [(each, problem) for each, problem in problems if problem is not None]
    for each, problem in wrong:
        print(f"{each.file}: {each.bug}: {problem}")
    print(f"{len(MUTATIONS) - len(wrong)} of {len(MUTATIONS)} bugs fit")
    return int(bool(wrong))


def main() -> int:
    """Run the table; 1 if a bug was not caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only look whether every bug fits")
    parser.add_argument("--only", default="", help="a word of the test's, file's or bug's name")
    parser.add_argument("--since", help="only bugs whose file or test changed since this commit")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.check:
        return check()
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest  # noqa: F401, PLC0415 - what every fork would load again
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    chosen = [m for m in MUTATIONS if any(options.only in each for each in (m.test, m.file, m.bug))]
    if options.since:
        changed = changed_since(options.since)
        chosen = [m for m in chosen if changed & {f"src/limbeck/{m.file}", tests_file(m)}]
    started = time.perf_counter()
    found = []
    forks = multiprocessing.get_context("fork")
    with forks.Pool(options.workers, maxtasksperchild=1) as pool:
        tests = sorted({m.test for m in chosen})
        groups = [tests[start :: options.workers] for start in range(options.workers)]
        if any(pool.map(without_bug, [group for group in groups if group], 1)):
            print("The tests are not green without a bug; nothing can be learnt.")
            return 1
        print(f"{len(tests)} tests are green without a bug", flush=True)
        for each in pool.imap(verdict, chosen, 1):
            found.append(each)
            print(f"{each.text:8} {each.mutation.test}: {each.mutation.bug}", flush=True)
    if not options.only and not options.since:
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / "mutations.md"
        path.write_text(report(found, time.perf_counter() - started), encoding="utf-8")
    return int(any(each.text != "caught" for each in found))


if __name__ == "__main__":
    sys.exit(main())
