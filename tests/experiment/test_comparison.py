"""Several runs side by side."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import limbeck
from limbeck.commands.report import report
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.scores import paired_difference
from limbeck.experiment.comparison import compare_runs
from limbeck.experiment.score_files import read_scores
from limbeck.report.comparison import comparison_page
from limbeck.report.run_files import Figure
from limbeck.report.words import interval
from tests.experiment.recordings import from_store, recorded
from tests.experiment.tiny_run import write_recipe, write_texts
from tests.report.test_run_report import assert_fetches_and_runs_nothing

HOSTILE = "<b>$x$&"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small student, a larger one, and one measured on other text."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder)
    write_texts(folder / "other.jsonl", 12, seed=9)
    changes = {
        "small": [],
        HOSTILE: ["student={type: depth, layers: [0, 1, 3]}", "seed=4"],
        "other": [f"evaluate.data={folder / 'other.jsonl'}"],
    }
    made = {}
    for name, options in changes.items():
        made[name] = folder / name
        config = limbeck.load(recipe, [*options, f"output={json.dumps(str(made[name]))}"])
        limbeck.assemble(config).train()
    return made


def test_differences_are_paired_by_document_and_recipes_compared(runs):
    compared = compare_runs([runs["small"], runs[HOSTILE]])
    assert [run.forward_kl for run in compared] == sorted(run.forward_kl for run in compared)
    best, other = compared
    a = read_scores(runs[other.name] / "scores.json").test
    b = read_scores(runs[best.name] / "scores.json").test
    assert other.behind == paired_difference(a, b, "forward_kl")
    assert other.behind["value"] == pytest.approx(other.forward_kl - best.forward_kl)
    assert best.behind is None
    assert best.is_efficient
    by_name = {run.name: run for run in compared}
    assert by_name["small"].is_efficient  # the smallest
    assert by_name["small"].parameters < by_name[HOSTILE].parameters
    assert {name: run.options["seed"] for name, run in by_name.items()} == {
        "small": "0",
        HOSTILE: "4",
    }
    assert by_name[HOSTILE].options["student.layers"] == "[0, 1, 3]"
    assert "output" not in best.options


def test_other_test_documents_are_shown_and_not_compared(runs):
    compared = compare_runs([runs["small"], runs["other"]])
    assert [run.behind for run in compared] == [None, None]
    page = comparison_page([asdict(run) for run in compared])
    assert "another teacher (or form of it) or other test documents: not comparable" in page


def test_scores_on_tasks_are_beside_each_other(runs, tmp_path):
    folders = []
    for name, score in (("small", 0.25), (HOSTILE, 0.5)):
        folder = shutil.copytree(runs[name], tmp_path / str(score))
        evaluation = json.loads((folder / "evaluation.json").read_text())
        figure = {"value": score, "low": score - 0.1, "high": score + 0.1}
        row = {"task": "choice", "metric": "acc", "items": 40, "floor": 0.25}
        row |= {"models": {"distilled": figure, "teacher": figure}}
        evaluation["suites"] = {"tasks": {"harness": "0", "rows": [row]}}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        folders.append(folder)
    found = compare_runs([*folders, runs["small"]])
    assert {run.name: run.tasks["choice, acc"]["value"] for run in found if run.tasks} == {
        "0.25": 0.25,
        "0.5": 0.5,
    }
    page = comparison_page([asdict(run) for run in found]).replace("\u202f", " ")
    assert "choice, acc" in page
    assert "50.0 % [40.0 %, 60.0 %]" in page


def test_a_moved_run_is_compared_where_it_is(runs, tmp_path):
    moved = tmp_path / "moved" / "small"
    shutil.copytree(runs["small"], moved)
    first, second = compare_runs([moved, runs["small"]])
    assert first.forward_kl == second.forward_kl
    assert {first.name, second.name} == {"moved/small", f"{runs['small'].parent.name}/small"}
    assert second.behind["value"] == 0


def test_the_page_has_every_figure_and_escapes_names(runs):
    compared = compare_runs([runs["small"], runs[HOSTILE]])
    page = comparison_page([asdict(run) for run in compared])
    assert_fetches_and_runs_nothing(page)
    assert "<b>$" not in page
    assert page.count("<svg") == 1
    for run in compared:
        assert f"{run.figures['cross_entropy']['value']:.3f}" in page
    assert "student.layers" in page


def run_command(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_a_page_or_json(runs, tmp_path):
    both = [runs["small"], runs[HOSTILE]]
    shown = run_command(*both, "--output", tmp_path / "page.html")
    first, second = compare_runs(both)
    assert f"{first.name}: lowest forward KL\n" in shown
    assert f"{second.name}: {interval(Figure(**second.behind))} nats higher\n" in shown
    assert "2 runs" in (tmp_path / "page.html").read_text()
    told = json.loads(run_command(*both, "--json"))
    assert told == json.loads(json.dumps([asdict(run) for run in compare_runs(both)]))


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="small is named twice"):
        compare_runs([runs["small"], runs["small"]])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs["small"], unfinished)
    (unfinished / "scores.json").unlink()
    with pytest.raises(DataError, match=r"scores\.json is missing\. Finish the run"):
        compare_runs([runs["small"], unfinished])
    with pytest.raises(ConfigError, match="are for several runs"):
        run_command(runs["small"], "--json")


def test_bounds_from_a_stored_top_k_are_not_compared_with_whole_distributions(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    path = recorded(tmp_path, {"type": "top_k", "k": 8}, objective={"temperature": 1.0})
    stored = [*from_store(tmp_path), f"output={tmp_path / 'stored'}"]
    for overrides in ([f"output={tmp_path / 'online'}"], stored):
        with limbeck.assemble(limbeck.load(path, overrides)) as whole:
            whole.train()
    compared = compare_runs([tmp_path / "online", tmp_path / "stored"])
    assert [run.behind for run in compared] == [None, None]
    assert [run.is_efficient for run in compared] == [True, True]
