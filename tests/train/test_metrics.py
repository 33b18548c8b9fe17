"""Records reach their sinks whole, once, and in words a person can read."""

import io
import json
import sys
import types

import pytest
from rich.console import Console

from limbeck.errors import ConfigError
from limbeck.train import JsonlSink, TerminalSink, make_sinks

STEP = {
    "kind": "step",
    "step": 3,
    "loss": 1.25,
    "learning_rate": 0.1,
    "grad_norm": 2.0,
    "tokens": 30,
    "seconds": 3.0,
    "tokens_per_second": 10.0,
}
RECORDS = [
    STEP,
    {"kind": "evaluation", "step": 3, "forward_kl": 0.5, "jensen_shannon": 0.1},
    {"kind": "non_finite", "step": 4, "rows": [7], "documents": ["a.jsonl:8"]},
    {"kind": "note", "step": 4, "text": "micro-batch is 2"},
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_before_the_next_record(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.begin(0, 10)
    for count, record in enumerate(RECORDS, start=1):
        sink.write(record)
        assert lines(tmp_path / "metrics.jsonl") == RECORDS[:count]
    sink.close()


def test_resuming_drops_later_steps_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = [json.dumps({"kind": "step", "step": step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(old) + '\n{"kind": "st')
    sink = JsonlSink(path)
    sink.begin(2, 10)
    sink.write({"kind": "step", "step": 3})
    sink.close()
    assert [r["step"] for r in lines(path)] == [1, 2, 3]


def test_a_new_run_begins_with_an_empty_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "note", "step": 0}\n')
    sink = JsonlSink(path)
    sink.begin(0, 10)
    sink.close()
    assert path.read_text() == ""


def test_nan_is_never_logged(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.begin(0, 10)
    with pytest.raises(ValueError, match="JSON compliant"):
        sink.write({"kind": "step", "step": 1, "loss": float("nan")})
    sink.close()


def shown(is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=160)
    sink = TerminalSink(console)
    sink.begin(2, 10)
    for record in RECORDS:
        sink.write(record)
    sink.close()
    return stream.getvalue()


def test_a_log_file_gets_plain_lines():
    text = shown(is_terminal=False)
    assert "step 3/10  loss 1.2500" in text
    assert "10 tokens/s  7 s left" in text
    assert "held out: forward kl 0.5000" in text
    assert "jensen" not in text
    assert "Rows [7] (a.jsonl:8)" in text
    assert "micro-batch is 2" in text
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar():
    text = shown(is_terminal=True)
    assert "3/10" in text
    assert "loss 1.2500" in text


def test_plain_lines_come_every_few_seconds_and_at_the_end():
    stream = io.StringIO()
    sink = TerminalSink(Console(file=stream, force_terminal=False, width=160))
    sink.begin(0, 10)
    for step in range(1, 11):
        sink.write({**STEP, "step": step})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/10", "10/10"]


def test_tensorboard_gets_numbers_by_kind(tmp_path):
    (sink,) = make_sinks(["tensorboard"], tmp_path)
    sink.begin(0, 10)
    for record in RECORDS:
        sink.write(record)
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(3, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/forward_kl")] == [(3, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_names_the_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'limbeck\[track\]'"):
        make_sinks([name], tmp_path)


def test_a_tracker_is_started_with_the_project_and_the_name_of_the_recipe(tmp_path, monkeypatch):
    started = []
    module = types.SimpleNamespace(
        init=lambda **options: started.append(options), log=print, finish=print
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    for folder in ("run", "run/stages/cross_entropy"):
        for spec in ("trackio", {"type": "trackio", "project": "mine", "name": "small"}):
            make_sinks([spec], tmp_path / folder)[0].begin(0, 1)
    assert [(each["project"], each["name"]) for each in started] == [
        ("limbeck", "run"),
        ("mine", "small"),
        ("limbeck", "cross_entropy"),
        ("mine", "small-cross_entropy"),
    ]


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"track\[0\]\.type: no tracker is called 'comet'.* mlflow, tensorboard"
    ):
        make_sinks(["comet"], tmp_path)
