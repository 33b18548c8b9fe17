"""The documentation says what the program does: its commands are run, its answers compared."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

import limbeck
from limbeck.config.foreign_names import FOREIGN_NAMES
from limbeck.data import sources
from limbeck.errors import ConfigError
from limbeck.evaluate.suites import suites
from limbeck.experiment import load, load_stages
from limbeck.losses import terms
from limbeck.losses.divergences import divergences
from limbeck.teachers import teachers
from limbeck.train.trackers import trackers
from tests.experiment.tiny_run import steps_of, write_recipe

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()
RECIPE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
ANSWERS = re.findall(
    r"```console\n\$ limbeck (?:distill|check) recipe\.yaml (.*?)\nlimbeck: (.*?)\n```",
    PAGE,
    re.DOTALL,
)


def test_there_are_at_least_ten_wrong_recipes():
    assert len(ANSWERS) >= 10


def test_the_recipe_behind_the_wrong_ones_is_valid(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(("overrides", "answer"), ANSWERS, ids=[o for o, _ in ANSWERS])
def test_a_wrong_recipe_is_answered_as_the_page_says(overrides, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError) as error:
        load("recipe.yaml", shlex.split(overrides))
    assert str(error.value) == answer


def test_the_table_of_other_tools_names_the_options_that_messages_name():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 12
    for theirs, here in rows:
        for name in re.findall(r"`(\w+)`", theirs):
            assert f"`{FOREIGN_NAMES[name]}`" in here


def test_torchrun_leaves_the_ranks_of_long_runs_time_to_save():
    """It kills them 30 s after a signal otherwise; jobs are ended 300 s after it."""
    page = (DOCS / "scale.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"torchrun (--.* -m limbeck distill .*)", page)
    assert len(lines) == 4
    signals = re.findall(r"`(--signals-to-handle [\w,]+)`", page)
    for line in lines:
        options = get_args_parser().parse_args(shlex.split(f"{signals[0]} {line}"))
        assert options.shutdown_timeout == 280
        assert options.signals_to_handle.split(",")[-1] == "SIGUSR1"


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


PLUGINS = re.findall(
    r"```python\n# (\w+\.py)\n(.*?)```\n\n```yaml\n(.*?)```",
    (DOCS / "extending.md").read_text(),
    re.DOTALL,
)


@pytest.fixture
def _registered_for_one_test(monkeypatch):
    for registry in (divergences, terms, teachers, sources, suites, trackers):
        registry.names()
        monkeypatch.setattr(registry, "_components", dict(registry._components))


def extended(folder, file, code, changes):
    """The recipe of a page's example over tiny models, beside the page's own file."""
    (folder / file).write_text(code)
    path = write_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    for section, value in yaml.safe_load(changes.replace("TEACHER", f"{folder}/teacher")).items():
        merge = isinstance(value, dict) and "type" not in value
        recipe[section] = {**recipe[section], **value} if merge else value
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_there_is_an_example_of_every_open_interface():
    assert [file for file, _, _ in PLUGINS] == [
        "my_divergence.py",
        "my_term.py",
        "my_teacher.py",
        "my_source.py",
        "my_suite.py",
        "my_tracker.py",
    ]


@pytest.mark.usefixtures("_registered_for_one_test")
@pytest.mark.parametrize(("file", "code", "changes"), PLUGINS, ids=[p[0] for p in PLUGINS])
def test_every_plugin_example_trains_and_resumes(file, code, changes, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    path = extended(tmp_path, file, code, changes)
    for overrides, resume in ((["optim.steps=4"], False), ([], True)):
        if resume:  # the run directory's recipe finds the file by itself
            path = tmp_path / "run" / "recipe.yaml"
        with limbeck.assemble(load(path, overrides)) as run:
            run.train(resume=resume)
    assert [r["step"] for r in steps_of(tmp_path / "run")] == [1, 2, 3, 4]
    if "track" in changes:
        lines = (tmp_path / "run" / "losses.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == ["2", "4"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    measured = evaluation.get("suites", {})
    assert list(measured) == list(run.config.evaluate.suites)
    for figures in measured.values():
        assert figures["distilled"]["student"] < figures["distilled"]["teacher"]


def test_the_on_policy_recipe_trains_on_what_its_student_writes(tmp_path, monkeypatch):
    """The page's objective and rollout over tiny models, with shorter texts."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    page = re.findall(r"```yaml\n(.*?)```", (DOCS / "on-policy.md").read_text(), re.DOTALL)
    shown, path = yaml.safe_load(page[0]), write_recipe(tmp_path, optim={"steps": 2})
    tiny = {"tokens": 12, "prompt_tokens": 6}
    sections = {"objective": shown["objective"], "rollout": {**shown["rollout"], **tiny}}
    path.write_text(json.dumps(json.loads(path.read_text()) | sections))
    with limbeck.assemble(load(path)) as run:
        run.train()
    for step in range(2):
        lines = (tmp_path / "run" / "rollouts" / f"step-{step}.jsonl").read_text().splitlines()
        assert len(lines) == 2
        assert set(json.loads(lines[0])) == {"prompt_ids", "token_ids", "logprobs", "finish"}
    explained = set(re.findall(r"`(\w+)`", (DOCS / "run-directory.md").read_text()))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {name for line in metrics for name in json.loads(line)} - {"kind", "step"} <= explained
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {*evaluation, *evaluation["trials"], *evaluation["trials"]["distilled"]} <= explained
    figures = re.findall(r"^\| `(rollout_\w+)` \|", (DOCS / "on-policy.md").read_text(), re.M)
    assert set(figures) == {name for name in steps_of(tmp_path / "run")[0] if "rollout" in name}


@pytest.mark.long
def test_every_rank_imports_the_file_from_the_command_line(tmp_path):
    path = extended(tmp_path, *PLUGINS[0])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "limbeck", "distill", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIMBECK_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(steps_of(tmp_path / "run")) == 6
