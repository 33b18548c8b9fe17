"""What the demo does with what it finds in its run directory."""

from pathlib import Path

import pytest

from limbeck.commands.demo import configure, what_is_there
from limbeck.config import dump
from limbeck.errors import ConfigError


def begun(output, steps=20):
    config = configure(Path("teacher"), output, steps)
    output.mkdir(exist_ok=True)
    (output / "recipe.yaml").write_text(dump(config))
    return config


def test_an_empty_place_is_neither_continued_nor_replaced(tmp_path):
    assert what_is_there(configure(Path("teacher"), tmp_path / "run", 20)) == (False, False)


def test_a_demo_that_was_stopped_is_continued(tmp_path):
    assert what_is_there(begun(tmp_path / "run")) == (True, False)


def test_a_demo_that_is_done_or_another_is_replaced(tmp_path):
    config = begun(tmp_path / "run")
    assert what_is_there(configure(Path("teacher"), tmp_path / "run", 30)) == (False, True)
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    assert what_is_there(config) == (False, True)


def test_a_run_that_is_no_demo_is_never_thrown_away(tmp_path):
    config = begun(tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(config.data.path, "years/of/work.jsonl"))
    with pytest.raises(ConfigError, match=r"years/of/work\.jsonl"):
        what_is_there(config)
