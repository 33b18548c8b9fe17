"""Pilots of a tiny recipe, the forecast from them, and what is refused."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

import limbeck
from limbeck.commands import load_verb
from limbeck.errors import ConfigError
from limbeck.evaluate.scaling import fit_curve
from limbeck.experiment.directory import require_directory
from limbeck.experiment.forecast import plan_pilots
from limbeck.experiment.forecast_figures import require_determined
from tests.evaluate.test_scaling import law, pilots
from tests.experiment.tiny_run import steps_of, write_recipe, write_texts

OPTIM = {"learning_rate": 0.003, "steps": 300, "tokens_per_step": 64, "warmup_steps": 30}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def loaded(tmp_path, *overrides):
    return limbeck.load(write_recipe(tmp_path, optim=OPTIM), overrides)


def predict(tmp_path, *words):
    load_verb("forecast").main([str(tmp_path / "recipe.yaml"), *words], standalone_mode=False)


def test_pilots_double_and_take_at_most_a_fifth_of_the_recipe(tmp_path):
    optim = {"schedule": "warmup_stable_decay", "schedule_options": "{num_decay_steps: 60}"}
    config = loaded(tmp_path, *(f"optim.{name}={value}" for name, value in optim.items()))
    pilots = plan_pilots(config, 4)
    assert [p.config.optim.num_steps for p in pilots] == [3, 3, 3, 6, 6, 12, 25]
    assert [p.config.seed for p in pilots] == [0, 1, 2, 0, 1, 0, 0]
    largest = pilots[-1].config.optim
    assert largest.num_warmup_steps == 30 * 25 // 300
    assert largest.schedule_options == {"num_decay_steps": round(60 * 25 / 300)}


@pytest.mark.parametrize(
    ("override", "count", "message"),
    [
        ("seed=0", 2, "--pilots must be at least 3"),
        ("optim.steps=200", 4, r"optim.steps at least 28\d"),
        ("evaluate.data=null", 4, "evaluate.data must name held-out text"),
        ("optim.learning_rate=[1e-3, 1e-4]", 4, "must be one number for a forecast"),
    ],
)
def test_a_recipe_that_cannot_be_forecast_is_refused_before_it_runs(
    tmp_path, override, count, message
):
    with pytest.raises(ConfigError, match=message):
        plan_pilots(loaded(tmp_path, override), count)


def test_a_forecast_runs_pilots_once_and_answers_from_them(tmp_path, capsys):
    optim = {"learning_rate": 0.01, "steps": 300, "tokens_per_step": 512, "warmup_steps": 0.1}
    objective = {"alpha": 1.0, "temperature": 1.0}
    write_recipe(tmp_path, optim=optim, objective=objective, memory={"micro_batch": 16})
    write_texts(tmp_path / "train.jsonl", 1100, seed=1)
    write_texts(tmp_path / "held.jsonl", 40, seed=2)
    folder = tmp_path / "run" / "forecast"
    predict(tmp_path, "--json", "--target-kl", "0.7", "--budget", "250000")
    answer = json.loads((folder / "forecast.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == answer
    assert [p["steps"] for p in answer["pilots"]] == [3, 3, 3, 6, 6, 12, 25]
    largest = answer["pilots"][-1]
    assert largest["tokens"] == steps_of(folder / "steps-25")[-1]["tokens"]
    rows = {row["budget"]: row for row in answer["rows"]}
    kl = rows["recipe"]["distilled"]["forward_kl"]
    assert rows["--budget"]["tokens"] == 250_000
    assert 1 < answer["recipe"]["passes"] < 2
    assert rows["four times"]["distilled"]["forward_kl"] is None  # the text has not as much
    assert kl["low"] < kl["value"] < kl["high"] < largest["distilled"]["forward_kl"]
    assert answer["target"]["tokens"]["value"] > largest["tokens"]
    assert "<svg" in (folder / "forecast.html").read_text()
    assert [*folder.rglob("*.safetensors")] == []

    metrics = folder / "steps-25" / "metrics.jsonl"
    before = metrics.read_bytes()
    predict(tmp_path)
    assert "What a budget reaches" in capsys.readouterr().out
    assert metrics.read_bytes() == before
    (folder / "text.json").write_text('{"rows": 480}')
    with pytest.raises(ConfigError, match="at most 4 times, and this one reads it 10 times"):
        predict(tmp_path)
    with pytest.raises(ConfigError, match="steps-3 is of another"):
        predict(tmp_path, "optim.learning_rate=0.02")


def test_a_forecast_in_the_output_is_not_in_a_runs_way(tmp_path):
    output = tmp_path / "run"
    (output / "forecast").mkdir(parents=True)
    require_directory(output, resume=False, overwrite=False)
    (output / "notes.txt").touch()
    with pytest.raises(ConfigError, match="files that are not a run's"):
        require_directory(output, resume=False, overwrite=False)


@pytest.mark.parametrize(
    ("law", "noise", "message"),
    [
        (lambda tokens, floor, scale: floor, 0.02, "not distinguishable from 0"),
        (law, 0.1, "must be narrower than the fall it predicts"),
        (law, 0.003, None),
    ],
)
def test_a_curve_that_its_pilots_do_not_determine_is_refused(law, noise, message):
    generator = np.random.Generator(np.random.Philox(0))
    curve = fit_curve(pilots(law, 100, noise, generator), "forward_kl")
    refused = nullcontext() if message is None else pytest.raises(ConfigError, match=message)
    with refused:
        require_determined(curve, "forward_kl", 50_000.0)
