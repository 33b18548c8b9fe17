"""The documentation says what the program does: its commands are run, its answers compared."""

import re
import shlex
from pathlib import Path

import pytest

from limbeck.errors import ConfigError
from limbeck.experiment import load, load_stages

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()
RECIPE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
ANSWERS = re.findall(
    r"```console\n\$ limbeck distill recipe\.yaml (.*?)\nlimbeck: (.*?)\n```", PAGE, re.DOTALL
)


def test_there_are_at_least_ten_wrong_recipes():
    assert len(ANSWERS) >= 10


def test_the_recipe_they_spoil_is_right(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(("overrides", "answer"), ANSWERS, ids=[o for o, _ in ANSWERS])
def test_a_wrong_recipe_is_answered_as_the_page_says(overrides, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError) as error:
        load("recipe.yaml", shlex.split(overrides))
    assert str(error.value) == answer


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.name)
def test_every_recipe_shown_is_a_recipe(page, tmp_path):
    """Blocks that begin with `teacher:` are whole recipes, and must be right."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        if block.startswith("teacher:"):
            (tmp_path / "recipe.yaml").write_text(block)
            if not load_stages(tmp_path / "recipe.yaml"):
                load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", sorted((DOCS.parent / "recipes").glob("*.yaml")), ids=str)
def test_every_recipe_that_ships_is_right(path):
    load(path)
