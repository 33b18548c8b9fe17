"""Further seeds of a run: each is the run of that seed, and all survive a resumption."""

import json

import pytest

import limbeck
from limbeck.errors import ConfigError
from limbeck.experiment.repeats import num_students
from tests.experiment.tiny_run import run, steps_of, write_recipe

SEEDS = ("evaluate.seeds=3", "evaluate.baseline=cross_entropy", "optim.learning_rate=[0.01, 1e-6]")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_every_seed_is_the_run_of_that_seed_at_the_chosen_rate(tmp_path):
    path = write_recipe(tmp_path, seed=4)
    outcome = run(path, *SEEDS)
    found = outcome.evaluation["seeds"]
    assert found["seeds"] == [4, 5, 6]
    for name in ("distilled", "cross_entropy"):
        main = outcome.evaluation["trials"][name]["forward_kl"]["value"]
        assert found["trials"][name]["forward_kl"]["each"][0] == main
    each = found["difference"]["forward_kl"]["each"]
    assert found["difference"]["forward_kl"]["value"] == pytest.approx(sum(each) / 3)
    other = run(
        path,
        "seed=5",
        "optim.learning_rate=0.01",
        "evaluate.baseline=cross_entropy",
        f"output={tmp_path / 'five'}",
    ).evaluation
    for name in ("distilled", "cross_entropy"):
        alone = other["trials"][name]["forward_kl"]["value"]
        assert found["trials"][name]["forward_kl"]["each"][1] == alone
    assert each[1] == pytest.approx(other["difference"]["forward_kl"]["value"])
    assert len({*each}) == 3
    kept = {p.parent.name for p in (tmp_path / "run" / "stages").rglob("student")}
    assert not [name for name in kept if "-seed-" in name]
    page = outcome.report.read_text()
    assert "Over 3 seeds" in page
    assert "Seed 6" in page


def test_seeds_are_added_by_a_resumption_and_trained_again_with_more_steps(tmp_path):
    path = write_recipe(tmp_path)
    whole = run(path, *SEEDS[:2]).evaluation["seeds"]
    assert num_students(limbeck.load(path, SEEDS[:2])) == 6
    split = ("evaluate.baseline=cross_entropy", f"output={tmp_path / 'split'}")
    run(path, *split, "evaluate.seeds=2")
    stages = tmp_path / "split" / "stages"
    before = (stages / "distilled-seed-1" / "metrics.jsonl").read_bytes()
    assert run(path, *split, "evaluate.seeds=3", resume=True).evaluation["seeds"] == whole
    assert (stages / "distilled-seed-1" / "metrics.jsonl").read_bytes() == before

    longer = run(path, *split, "evaluate.seeds=2", "optim.steps=9", resume=True).evaluation
    assert longer["seeds"]["seeds"] == [0, 1]
    for folder in ("distilled-seed-1", "cross_entropy-seed-1"):
        assert len(steps_of(stages / folder)) == 9
    assert not (stages / "distilled-seed-2").exists()
    assert json.loads((tmp_path / "split" / "evaluation.json").read_text()) == longer


def test_seeds_need_held_out_text(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.seeds: compares students on held-out text"):
        limbeck.load(write_recipe(tmp_path), ["evaluate.seeds=2", "evaluate.data=null"])
