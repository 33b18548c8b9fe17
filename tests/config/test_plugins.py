"""Components of a user's own: found beside the recipe or installed, and refused with the reason."""

import json

import pytest

from limbeck.config import dump
from limbeck.errors import ConfigError
from limbeck.experiment import load, load_stages
from limbeck.losses.divergences import divergences

RECIPE = {
    "teacher": {"type": "online", "path": "some/teacher"},
    "student": {"type": "depth", "keep": 12},
    "data": {"type": "text", "path": "data.jsonl"},
    "optim": {"learning_rate": 3e-4, "steps": 1000},
    "output": "runs/x",
}

PLUGIN = """
from limbeck.losses.divergences import divergences


@divergences.register("{name}")
def mine(student, teacher, *, power: float = 1.0):
    \"\"\"A divergence for tests.\"\"\"
    return (teacher.exp() - student.exp()).abs().pow(power).sum(-1)
"""


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch):
    divergences.names()
    monkeypatch.setattr(divergences, "_components", dict(divergences._components))


def recipe(folder, name, plugins=("mine.py",), **changes):
    folder.mkdir(exist_ok=True)
    divergence = {"type": name, "power": 2.0}
    body = RECIPE | {"plugins": list(plugins), "objective": {"divergence": divergence}} | changes
    (folder / "recipe.yaml").write_text(json.dumps(body))
    return folder / "recipe.yaml"


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(text)


def test_a_plugin_beside_the_recipe_is_imported_before_components_are_checked(tmp_path):
    write(tmp_path / "here", PLUGIN.format(name="beside"))
    config = load(recipe(tmp_path / "here", "beside"))
    assert config.plugins == (tmp_path / "here" / "mine.py",)
    assert load(recipe(tmp_path / "here", "beside")) == config, "imported once"
    with pytest.raises(ConfigError, match=r"objective.divergence.power: .*number"):
        load(recipe(tmp_path / "here", "beside"), ["objective.divergence.power=much"])


def test_a_resolved_recipe_finds_its_plugins_from_another_folder(tmp_path):
    write(tmp_path / "here", PLUGIN.format(name="resolved"))
    resolved = dump(load(recipe(tmp_path / "here", "resolved")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(resolved)
    assert load(tmp_path / "run" / "recipe.yaml").plugins == (tmp_path / "here" / "mine.py",)


def test_stages_share_the_plugins_of_their_recipe(tmp_path):
    write(tmp_path / "here", PLUGIN.format(name="staged"))
    stages = [{"name": "first"}, {"name": "second", "objective": {"alpha": 0.5}}]
    loaded = load_stages(recipe(tmp_path / "here", "staged", stages=stages))
    assert {stage.config.plugins for stage in loaded} == {(tmp_path / "here" / "mine.py",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"plugins\[0\]: must be a Python file, and .*mine.py is none"),
        ("x = 1\ny = (\n", r"plugins\[0\]: .*mine.py, line 2: SyntaxError: '\(' was never closed"),
        ("x = 1\n\nimport no_such_module\n", r"mine.py, line 3: ModuleNotFoundError: .*no_such"),
        (PLUGIN.format(name="forward_kl"), "line 5: ValueError: a divergence 'forward_kl' is alr"),
    ],
    ids=["missing", "syntax", "import", "taken"],
)
def test_a_plugin_that_cannot_be_imported_is_named_with_its_line(tmp_path, text, message):
    if text is not None:
        write(tmp_path / "here", text)
    with pytest.raises(ConfigError, match=message) as error:
        load(recipe(tmp_path / "here", "unknown"))
    assert "no divergence is called" not in str(error.value)


def test_an_installed_package_registers_through_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "installed_terms.py").write_text(PLUGIN.format(name="installed"))
    facts = tmp_path / "installed_terms-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-terms\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[limbeck.plugins]\nterms = installed_terms\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load(recipe(tmp_path, "installed", plugins=()))
    (facts / "entry_points.txt").write_text("[limbeck.plugins]\nterms = not_installed\n")
    with pytest.raises(ConfigError, match="the installed plugin terms = not_installed fails: Mod"):
        load(recipe(tmp_path, "installed", plugins=()))
