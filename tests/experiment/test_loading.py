"""What parts of a recipe say of each other, and the schema editors use."""

import pytest

import limbeck
from limbeck.errors import ConfigError
from limbeck.experiment import schema
from tests.experiment.tiny_run import write_recipe


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim.learning_rate=[1e-3, 1e-3]"], "optim.learning_rate: must name each rate once"),
        (
            ["evaluate.baseline=cross_entropy", "evaluate.baseline_learning_rate=[1e-3, 0.001]"],
            "evaluate.baseline_learning_rate: must name each rate once",
        ),
        (
            ["optim.epochs=2"],
            r"optim\.steps: must be given, or optim\.epochs .*, got steps: 6, epochs: 2\.0\.",
        ),
        (
            ["parallel.shard=none", "parallel.replicate=2"],
            r"parallel\.replicate: must be 1 with parallel\.shard=none, .* got 2\.",
        ),
        (["optim.steps=null"], r"optim\.steps: must be given, .* got neither\."),
        (["optim.steps=null", "optim.epochs=0"], r"optim\.epochs: must be greater than 0, got 0"),
        (["optim.warmup_steps=3", "optim.steps=3"], "must be less than optim.steps = 3, got 3"),
        (["evaluate.baseline_learning_rate=1e-3"], "evaluate.baseline is not set"),
        (["evaluate.data=null", "optim.learning_rate=[1e-3, 2e-3]"], "evaluate.data is not set"),
        (["evaluate.data=null", "evaluate.baseline=cross_entropy"], "evaluate.data is not set"),
        (["evaluate.data=null", "evaluate.patience=2"], "evaluate.data is not set"),
        (
            ["optim.schedule=cosine", "optim.schedule_options={a: 1, b: 2}"],
            r"schedule_options\.a(.|\n)*schedule_options\.b",
        ),
    ],
)
def test_all_contradictions_between_sections_are_listed(tmp_path, overrides, told):
    with pytest.raises(ConfigError, match=told):
        limbeck.load(write_recipe(tmp_path), overrides)


def test_the_schema_knows_every_open_part_and_allows_none_where_the_recipe_does():
    choice = schema()["$defs"]["ObjectiveConfig"]["properties"]["positions"]["anyOf"]
    kinds = [each["properties"]["type"]["const"] for each in choice if "properties" in each]
    assert "teacher_entropy" in kinds
    assert {"type": "null"} in choice
    student = schema()["properties"]["student"]["anyOf"]
    assert {"type": "null"} not in student
