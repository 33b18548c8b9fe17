"""`limbeck evaluate` on several ranks: a sharded student has the figures of a whole one."""

import json

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from limbeck.distributed.sharding import is_sharded
from limbeck.evaluate import generation
from limbeck.evaluate.fidelity import Fidelity
from limbeck.experiment import assemble, load
from tests.distributed.processes import launched
from tests.experiment.tiny_run import write_model, write_recipe
from tests.tokenizers.small import small

SHORT = {"prompts": 3, "prompt_tokens": 4, "tokens": 8}
SUITES = [{"type": name, **SHORT} for name in ("generation", "speculative")]


def evaluate(folder):
    with assemble(load(folder / "recipe.yaml")) as run:
        evaluation = run.evaluate(folder / "student")
        if run.is_main:
            (folder / f"{run.world.size}.json").write_text(json.dumps(evaluation))


def evaluate_sharded(folder):
    """Of the student a rank holds shards, and gathers one block at a time.

    Of three prompts the ranks have two and one, and write each in a call of its own.
    """
    torch.set_num_threads(1)
    generation.SAMPLED_AT_ONCE = 1
    plain, seen = Fidelity._scores, []

    def scores(fidelity, student, rows):
        assert isinstance(student, FSDPModule)
        seen.append(all(is_sharded(p) for block in student.blocks for p in block.parameters()))
        return plain(fidelity, student, rows)

    Fidelity._scores = scores
    evaluate(folder)
    assert seen == [True]


def numbers(tree, at=""):
    """Every number of nested data with its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from numbers(value, f"{at}.{key}")
        elif isinstance(value, int | float):
            yield f"{at}.{key}", value


@pytest.mark.long
def test_two_ranks_with_half_a_student_each_have_the_figures_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    write_recipe(tmp_path, evaluate={"suites": SUITES})
    write_model(tmp_path / "student", rows=len(small()), layers=2, seed=7)
    evaluate(tmp_path)
    assert launched(2, evaluate_sharded, tmp_path) == [0, 0]
    one, two = (dict(numbers(json.loads((tmp_path / f"{n}.json").read_text()))) for n in (1, 2))
    assert len(one) > 30
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
