"""A real teacher writes 200 answers, is killed twice, and the file is that of one process."""

import json
import os
import signal
import sys
import time

import pytest

from limbeck.data import corpus_path
from limbeck.experiment import load
from limbeck.models import cache_folder, embedded_teacher
from tests.distributed.processes import context
from tests.writing.test_writing import life
from tests.writing.tiny_writer import rows_of


@pytest.mark.long
def test_200_answers_of_a_real_teacher_are_the_same_after_two_kills(tmp_path, capsys):
    teacher = embedded_teacher(cache_folder(), print)
    recipe = {
        "teacher": {"type": "online", "path": str(teacher)},
        "student": {"type": "depth", "keep": 15},
        "data": {"path": str(corpus_path("train")), "max_documents": 200, "sequence_length": 256},
        "optim": {"learning_rate": 0.0003, "steps": 1, "tokens_per_step": 256},
        "write": {"output": str(tmp_path / "written.jsonl"), "tokens": 24, "batch": 25,
                  "prompt_tokens": 16, "truncated": "keep"},
        "output": str(tmp_path / "run"),
        "device": "cpu",
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    load(path)
    whole, seconds = {}, []
    for kills in ((), (3, 3)):
        for after in (*kills, 1 << 30):
            started = time.monotonic()
            process = context().Process(target=life, args=(path, str(cache_folder()), after))
            process.start()
            process.join(1500)
            assert process.exitcode == (0 if after > 200 else -signal.SIGKILL)
            seconds.append(time.monotonic() - started)
        for name in ("written.jsonl", "written.jsonl.provenance"):
            body = (tmp_path / name).read_bytes()
            assert whole.setdefault(name, body) == body
            if not kills:
                os.unlink(tmp_path / name)
    rows = rows_of(tmp_path / "written.jsonl")
    with capsys.disabled():
        sys.stdout.write(f"\n{len(rows)} rows; seconds of each process: {seconds}\n{rows[0]}\n")
    assert len(rows) > 150
