"""Pilots of a tiny recipe, the forecast from them, and what is refused."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

import limbeck
from limbeck.commands import load_verb
from limbeck.data.mixture import passes
from limbeck.errors import ConfigError
from limbeck.evaluate.scaling import fit_curve
from limbeck.experiment.directory import require_directory
from limbeck.experiment.forecast import Pilots, alternative, most_passes, plan_pilots
from limbeck.experiment.forecast_figures import points, require_determined, target
from limbeck.report.forecast_page import against_sentence, target_sentence
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

    predict(tmp_path, "--json", "--against", "student.layers=[0]")
    assert metrics.read_bytes() == before
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    other, own = answer["against"], {row["budget"]: row for row in answer["rows"]}
    assert other["name"] == "student.layers=[0]"
    assert other["parameters"] < answer["parameters"]
    rows = {row["budget"]: row for row in other["rows"]}
    assert rows.keys() == own.keys()
    assert rows["recipe"]["hours"] == own["recipe"]["hours"]["distilled"]
    gap = own["recipe"]["distilled"]["forward_kl"]["value"] - rows["recipe"]["other"]["value"]
    assert rows["recipe"]["difference"]["value"] == pytest.approx(gap)
    place = folder / "against-student.layers=-0" / "forecast" / "steps-25"
    assert steps_of(place)[-1]["tokens"] == largest["tokens"]
    page = (folder / "forecast.html").read_text()
    assert "Against student.layers=[0]" in page
    assert "which is the better buy is not decided" in page  # of a random teacher

    (folder / "facts.json").write_text('{"passes": 10.0}')
    with pytest.raises(ConfigError, match="at most 4 times, and this one reads it 10 times"):
        predict(tmp_path)
    with pytest.raises(ConfigError, match="steps-3 is of another"):
        predict(tmp_path, "optim.learning_rate=0.02")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("teacher.dtype=bfloat16", "teacher"),
        ("evaluate.max_tokens=100", "evaluate"),
        ("data.sequence_length=24", "data.sequence_length"),
    ],
)
def test_students_that_are_not_measured_alike_are_not_compared(tmp_path, change, what):
    config = loaded(tmp_path)
    with pytest.raises(ConfigError, match=f"its changes are of {what}\\."):
        alternative(config, loaded(tmp_path, change), [change])


def test_the_better_buy_is_named_only_where_the_difference_is_decided():
    def said(low, high):
        gap = {"value": (low + high) / 2, "low": low, "high": high}
        row = {"budget": "recipe", "hours": 0.5, "difference": gap}
        return against_sentence({"name": "student.keep=20", "rows": [row]})

    assert "not decided" in said(-0.1, 0.2)
    unknown = {"budget": "recipe", "hours": 0.5, "difference": None}
    assert "is not known" in against_sentence({"name": "student.keep=20", "rows": [unknown]})
    assert "this recipe is the better buy: 0.150 [0.100, 0.200] nats lower" in said(-0.2, -0.1)
    assert "student.keep=20 is the better buy: 0.150 [0.100, 0.200]" in said(0.1, 0.2)


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


def test_a_target_that_some_fits_reach_is_not_called_out_of_reach():
    generator = np.random.Generator(np.random.Philox(3))
    curve = fit_curve(pilots(law, 100, 0.003, generator), "forward_kl")
    floor = float(curve.floor[0])
    assert floor > 0
    assert curve.floor.min() < 0.9 * floor
    found = target({"forward_kl": curve}, Pilots((), 1e-3, 512.0), 0.98 * floor, 1e9)
    assert found["tokens"]["value"] is None
    assert found["tokens"]["low"] is not None
    assert "not determined: from" in target_sentence(found)
    never = target({"forward_kl": curve}, Pilots((), 1e-3, 512.0), 1e-6, 1e9)
    assert never["tokens"]["low"] is None
    assert "any number of tokens" in target_sentence(never)


def test_a_target_beyond_four_passes_needs_more_text():
    generator = np.random.Generator(np.random.Philox(3))
    curve = fit_curve(pilots(law, 100, 0.003, generator), "forward_kl")
    for most, needs in ((1e12, False), (20_000.0, True)):
        found = target({"forward_kl": curve}, Pilots((), 1e-3, 512.0), law(50_000.0), most)
        assert found["tokens"]["value"] == pytest.approx(50_000, rel=0.3)
        assert ("more text" in target_sentence(found)) == needs
    assert points(curve, 50_000.0, 20_000.0)[-1]["tokens"] == pytest.approx(20_000)


def test_passes_are_those_of_the_source_that_is_read_most_often(tmp_path):
    texts = [write_texts(tmp_path / f"{name}.jsonl", n, 1) for name, n in (("a", 4), ("b", 60))]
    recipe = json.loads(write_recipe(tmp_path, optim=OPTIM).read_text())
    mix = [{"path": str(path), "type": "text"} for path in texts]
    recipe["data"] = {"mix": mix, "sequence_length": recipe["data"]["sequence_length"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with limbeck.assemble(limbeck.load(tmp_path / "recipe.yaml")) as run:
        optim = run.config.optim
        rows = optim.num_steps * optim.rows_per_step(run.config.data.sequence_length)
        read = passes(run.parts.data, rows)
        assert read["a"] > 5 * read["b"]
        assert most_passes(run) == read["a"]


def test_rows_that_a_run_writes_are_no_passes_over_its_text(tmp_path):
    path, times = write_recipe(tmp_path, optim=OPTIM, objective={"alpha": 1.0}), []
    for options in ([], ["rollout={share: 0.5, tokens: 12, prompt_tokens: 6}"]):
        with limbeck.assemble(limbeck.load(path, options)) as run:
            times.append(most_passes(run))
    assert times[1] == times[0] / 2 > 0
