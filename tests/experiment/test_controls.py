"""The steps of the baseline that fit into the distilled student's time are found once."""

import json

import pytest

from limbeck.config import OptimConfig
from limbeck.errors import DataError
from limbeck.experiment.controls import equal_time_steps


def write_times(folder, steps, seconds):
    folder.mkdir(exist_ok=True)
    line = {"kind": "step", "step": steps, "seconds": seconds, "tokens": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def steps_of(tmp_path, recipe_steps):
    folders = [tmp_path / name for name in ("longer", "distilled", "baseline")]
    folders[0].mkdir(exist_ok=True)
    return equal_time_steps(*folders, recipe_steps)


def test_steps_fit_into_the_time_are_kept_and_grow_with_the_recipe(tmp_path):
    write_times(tmp_path / "distilled", 10, 30.0)
    write_times(tmp_path / "baseline", 10, 12.0)
    assert steps_of(tmp_path, 10) == 25
    write_times(tmp_path / "distilled", 10, 60.0)  # another machine, on which the run is resumed
    assert steps_of(tmp_path, 10) == 25
    assert steps_of(tmp_path, 12) == 50
    write_times(tmp_path / "distilled", 14, 20.0)
    assert steps_of(tmp_path, 14) == 50, "never fewer than were taken"


def test_a_student_that_stopped_early_leaves_less_time(tmp_path):
    write_times(tmp_path / "distilled", 3, 9.0)
    write_times(tmp_path / "baseline", 10, 12.0)
    assert steps_of(tmp_path, 10) == 8


def test_a_student_without_times_is_refused(tmp_path):
    write_times(tmp_path / "distilled", 10, 30.0)
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="one has none"):
        steps_of(tmp_path, 10)


def test_warm_up_and_schedule_scale_with_the_steps():
    optim = OptimConfig(
        learning_rate=0.1, steps=100, warmup_steps=10, schedule_options={"num_decay_steps": 20}
    )
    longer = optim.rescaled(250)
    assert (longer.steps, longer.warmup_steps) == (250, 25)
    assert longer.schedule_options == {"num_decay_steps": 50}
