"""Chunks of a text are tokenised by several processes, and nothing of the result shows it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.data import build, workers
from limbeck.errors import DataError, RunError
from tests.data.data_files import load, write
from tests.distributed.processes import context
from tests.tokenizers.small import SENTENCES

ROWS = [
    {"text": f"{number} {sentence}", "weight": number % 3, "domain": f"d{(7 * number) % 5}"}
    for number in range(20)
    for sentence in SENTENCES
]
BAD = {"text": None, "weight": 1, "domain": "bad"}
EMPTY = {"text": "a", "weight": 1, "domain": "short"}
COLUMNS = {"weight": "weight", "source": "domain"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHUNK_ROWS", 4)


def prepared(
    folder: Path, rows: list[Any], count: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, bytes]:
    """The bytes of every file of the cache, as `count` processes make it."""
    monkeypatch.setattr(workers, "num_processes", lambda: count)
    folder.mkdir()
    load(write(folder / "rows.jsonl", rows), columns=COLUMNS, **options)
    found = {path.name: path.read_bytes() for path in folder.glob("cache/*/*")}
    assert "tokens.npy" in found
    return found


@pytest.mark.parametrize("rows", [ROWS, ROWS[:7], [*ROWS[:9], EMPTY, BAD, *ROWS[9:], BAD]])
def test_the_files_are_those_of_one_process(
    rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, *others = (
        prepared(tmp_path / str(count), rows, count, monkeypatch, bad_rows="skip")
        for count in (1, 2, 5)
    )
    for other in others:
        assert other == whole


@pytest.mark.parametrize("at", [1, 30])
def test_bad_rows_are_named_as_by_one_process(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS[:at], BAD, *ROWS, BAD])
    told = []
    for count in (1, 3):
        monkeypatch.setattr(workers, "num_processes", lambda count=count: count)
        with pytest.raises(DataError) as refused:
            load(path, columns=COLUMNS)
        told.append(str(refused.value))
    assert f"{path}:{at + 1}: column 'text'" in told[0]
    assert told[0] == told[1]


def numbers(end: int) -> Iterator[int]:
    yield from range(end)


def test_a_killed_process_is_named_by_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "num_processes", lambda: 2)
    parent = os.getpid()

    def work(item: int) -> int:
        if item == 5:
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    results = workers.in_order(work, numbers(9), lambda item: f"rows of {item}")
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(RunError, match="its process for rows of 5 was killed"):
        next(results)
    assert not workers.multiprocessing.active_children()


def test_an_error_in_a_process_says_where_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "num_processes", lambda: 2)

    def work(item: int) -> float:
        return 1 / (item - 4)

    with pytest.raises(RuntimeError, match=r"(?s)Tokenising rows of 4 failed.*ZeroDivisionError"):
        list(workers.in_order(work, numbers(9), lambda item: f"rows of {item}"))


def test_an_error_that_a_user_can_fix_is_the_one_that_was_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "num_processes", lambda: 2)

    def work(item: int) -> int:
        if item == 4:
            raise DataError("Row 4 must have text.")
        return item

    with pytest.raises(DataError, match=r"^Row 4 must have text\.$"):
        list(workers.in_order(work, numbers(9), str))


def slow(item: int) -> int:
    if item >= workers.ALONE:
        time.sleep(60)
    return item


def killed_parent(file: Path) -> None:
    """Write the processes' ids, and be killed while they work."""
    workers.num_processes = lambda: 2
    started = []

    def items() -> Iterator[int]:
        yield from range(workers.ALONE + 2)
        started.extend(child.pid for child in workers.multiprocessing.active_children())
        file.write_text(" ".join(map(str, started)))
        os.kill(os.getpid(), signal.SIGKILL)

    list(workers.in_order(slow, items(), str))


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    process = context().Process(target=killed_parent, args=(tmp_path / "ids",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    ids = [int(number) for number in (tmp_path / "ids").read_text().split()]
    assert len(ids) == 2
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(map(alive, ids)):
        time.sleep(0.01)
    assert not any(map(alive, ids))


def alive(number: int) -> bool:
    """Whether a process works; one that has ended may wait to be collected."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
