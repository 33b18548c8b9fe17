"""`limbeck distill` on a recipe with stages, as a user meets it."""

import json

from limbeck.experiment import load
from tests.commands.processes import limbeck
from tests.experiment.test_stages import CASCADE, write_stages
from tests.experiment.tiny_run import steps_of


def test_stages_run_in_order_and_each_result_is_printed(tmp_path):
    write_stages(tmp_path, CASCADE[:2])
    done = limbeck("distill", "recipe.yaml", "--json", "--resume", cwd=tmp_path)
    assert list(json.loads(done.stdout)["stages"]) == ["correction", "three"]
    assert "stage 2 of 2, three, starts in" in done.stderr
    again = limbeck("distill", "recipe.yaml", "--resume", cwd=tmp_path)
    assert "stage 1 of 2, correction, is done" in again.stderr
    assert "stage    three" in again.stdout
    assert len(steps_of(tmp_path / "run" / "stages" / "three")) == 6
    refused = limbeck("distill", "recipe.yaml", cwd=tmp_path, code=2)
    assert "already holds stages" in refused.stderr


def test_the_recipe_of_each_stage_is_printed_whole(tmp_path):
    write_stages(tmp_path)
    printed = limbeck("distill", "recipe.yaml", "--print-config", cwd=tmp_path).stdout
    recipes = printed.split("---\n")[1:]
    assert [recipe.splitlines()[0] for recipe in recipes] == [
        "# stage correction",
        "# stage three",
        "# stage two",
    ]
    (tmp_path / "two.yaml").write_text(recipes[2])
    config = load(tmp_path / "two.yaml")
    assert config.optim.steps == 4
    assert config.teacher["path"].endswith("run/stages/three/student")
