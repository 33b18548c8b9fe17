"""Long work says how far it is, and not more often than one can read."""

import io

from rich.console import Console

from limbeck import progress
from limbeck.progress import ProgressLines


def test_work_of_unknown_length_prints_a_line_every_few_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    lines = ProgressLines(Console(file=file, width=200), "tokenising")
    for seconds, rows in ((1.0, 10), (4.0, 20), (5.0, 30), (6.0, 40), (10.0, 50)):
        now[0] = 100.0 + seconds
        lines(rows, rows * 1000)
    assert file.getvalue().splitlines() == [
        "tokenising: 30 rows, 30,000 tokens, 6,000 tokens/s",
        "tokenising: 50 rows, 50,000 tokens, 5,000 tokens/s",
    ]
