"""What the demo does with what it finds in its run directory."""

from pathlib import Path

import pytest

from limbeck.commands import demo_store
from limbeck.commands.demo import as_begun, what_is_there
from limbeck.commands.demo_store import shipped_recipe
from limbeck.config import dump
from limbeck.errors import ConfigError


def begun(output, steps=20, more=()):
    config = shipped_recipe("demo.yaml", Path("teacher"), output, steps, more)
    output.mkdir(exist_ok=True)
    (output / "recipe.yaml").write_text(dump(config))
    return config


def test_an_empty_run_directory_is_neither_continued_nor_replaced(tmp_path):
    assert what_is_there(shipped_recipe("demo.yaml", Path("teacher"), tmp_path / "run", 20)) == (
        False,
        False,
    )


def test_a_demo_that_was_stopped_is_continued(tmp_path):
    assert what_is_there(begun(tmp_path / "run")) == (True, False)


def test_a_stopped_demo_continues_in_its_number_format_whatever_the_clock_says(tmp_path):
    options = ("parallel.compute_dtype=bfloat16", "teacher.dtype=bfloat16")
    for more, now in (((), options), (options, ())):
        output = tmp_path / f"run-{len(more)}"
        before = begun(output, more=more)
        config = as_begun(shipped_recipe("demo.yaml", Path("teacher"), output, 20, now))
        assert config == before
        assert what_is_there(config) == (True, False)
        (output / "evaluation.json").write_text("{}")
        again = shipped_recipe("demo.yaml", Path("teacher"), output, 20, now)
        assert as_begun(again) == again  # a finished one is replaced, in the format of today


def test_a_demo_that_is_done_or_another_is_replaced(tmp_path):
    config = begun(tmp_path / "run")
    assert what_is_there(shipped_recipe("demo.yaml", Path("teacher"), tmp_path / "run", 30)) == (
        False,
        True,
    )
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    assert what_is_there(config) == (False, True)


def test_a_run_that_is_no_demo_is_never_deleted(tmp_path):
    config = begun(tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(config.data.path, "years/of/work.jsonl"))
    with pytest.raises(ConfigError, match=r"years/of/work\.jsonl"):
        what_is_there(config)


def test_the_second_act_takes_as_many_steps_as_are_asked_for(tmp_path):
    told = [demo_store.configure(Path("teacher"), tmp_path, steps) for steps in (None, 30)]
    assert [config.optim.steps for config in told] == [8, 30]
    students = [demo_store.learner(told[1], t) for t in demo_store.TEMPERATURES]
    assert {each.teacher["path"] for each in students} == {str(tmp_path / "store")}
    assert len({each.output for each in students}) == 2
    assert told[1].record.form["temperatures"] == list(demo_store.TEMPERATURES)
