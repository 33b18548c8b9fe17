"""The command line as a user and a scheduler meet it."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from limbeck import commands
from limbeck.errors import ConfigError
from tests.commands.processes import limbeck
from tests.distributed.processes import live
from tests.experiment.tiny_run import write_recipe


@pytest.mark.parametrize(
    "verb", ["demo", "peek", "check", "shrink", "distill", "evaluate", "export", "report"]
)
def test_every_verb_explains_itself(verb, tmp_path):
    told = limbeck(verb, "--help", cwd=tmp_path).stdout
    assert "Usage" in told
    assert len(told.splitlines()) > 10


def test_the_version_is_printed():
    command = [sys.executable, "-m", "limbeck", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("limbeck ")


def test_a_wrong_recipe_exits_with_2_without_a_traceback(tmp_path):
    path = write_recipe(tmp_path)
    done = limbeck("distill", path.name, "objective.alpha=7", cwd=tmp_path, code=2)
    assert "objective.alpha: must be between 0 and 1, got 7" in done.stderr


def test_tasks_of_srun_without_torchrun_are_refused_with_the_line_to_use(monkeypatch, tmp_path):
    recipe = str(tmp_path / "none.yaml")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"8 times: each .* srun --ntasks-per-node=1 torchrun "):
        commands.refuse_early("distill", [recipe])
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        commands.refuse_early("distill", [recipe])


def test_check_lists_mistakes_of_every_kind_at_once(tmp_path):
    changes = ["data.path=no.jsonl", "optim.schedule=cosinus", "teacher.dtyp=1", "seed=-1"]
    told = limbeck("check", write_recipe(tmp_path).name, *changes, cwd=tmp_path, code=2).stderr
    places = [line.split(":")[0].strip() for line in told.splitlines()[1:]]
    assert places == ["seed", "teacher.dtyp", "optim.schedule", "data.path"]


def test_a_missing_recipe_exits_with_2(tmp_path):
    assert "cannot be read" in limbeck("distill", "no.yaml", cwd=tmp_path, code=2).stderr


def test_bad_data_exits_with_3_and_names_the_line(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n{"txet": "bad"}\n')
    done = limbeck("distill", path.name, cwd=tmp_path, code=3)
    assert "train.jsonl:2" in done.stderr


def test_the_resolved_recipe_can_be_printed_and_read_again(tmp_path):
    path = write_recipe(tmp_path)
    printed = limbeck("distill", path.name, "seed=9", "--print-config", cwd=tmp_path).stdout
    (tmp_path / "again.yaml").write_text(printed)
    again = limbeck("distill", "again.yaml", "--print-config", cwd=tmp_path).stdout
    assert printed == again
    assert "seed: 9" in printed


def test_running_out_of_memory_exits_with_4_and_names_the_options_to_change(monkeypatch, capsys):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(commands, "build", lambda: exhausted)
    assert commands.run() == 4
    assert "memory.micro_batch" in capsys.readouterr().err


def rank_with_a_bug_and_a_thread_that_waits():
    def broken():
        raise LookupError("a bug")

    os.environ["RANK"] = "0"
    commands.build = lambda: broken
    threading.Thread(target=threading.Event().wait).start()
    commands.main()


def test_a_rank_ends_after_an_unexpected_error_whatever_still_waits():
    """As NCCL does for ranks that do not come; else the launcher never stops the others."""
    assert live(rank_with_a_bug_and_a_thread_that_waits) == 1


@pytest.mark.slow
def test_distill_evaluate_and_report_give_the_same_figures(tmp_path):
    path = write_recipe(tmp_path)
    done = limbeck("distill", path.name, "--json", cwd=tmp_path)
    evaluation = json.loads(done.stdout)
    assert evaluation["trials"]["distilled"]["forward_kl"]["value"] > 0
    told = limbeck("evaluate", path.name, "--json", cwd=tmp_path)
    figures = json.loads(told.stdout)
    assert figures["trials"]["distilled"]["forward_kl"] == pytest.approx(
        evaluation["trials"]["distilled"]["forward_kl"], rel=1e-4
    )
    assert "loss" in (tmp_path / "run" / "log.txt").read_text()
    (tmp_path / "run" / "report.html").unlink()
    assert "report.html" in limbeck("report", "run", cwd=tmp_path).stdout
    assert (tmp_path / "run" / "report.html").exists()
    assert "already holds a run" in (limbeck("distill", path.name, cwd=tmp_path, code=2).stderr)


def test_a_run_directory_in_use_exits_with_75(tmp_path):
    from filelock import FileLock

    path = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        done = limbeck("distill", path.name, cwd=tmp_path, code=75)
    assert "Only one process may use" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["distill", "missing.yaml"], 2),
        (["check", "recipe.yaml", "optim.step=5", "--plan"], 2),
        (["record", "--overwrite", "recipe.yaml", "memory.micro_batch=none"], 2),
        (["distill", "recipe.yaml", "data.path=no.jsonl"], 2),
        (["evaluate", "recipe.yaml", "teacher.path=./nowhere"], 2),
        (["distill", "./nowhere", "2 layers", "train.jsonl", "--plan"], 2),
        (["distill", "teacher", "./nowhere", "train.jsonl"], 2),
        (["distill", "teacher", "1.5B", "no.jsonl", "optim.steps=2"], 2),
        (["distill", "teacher", "2 layers", "empty.jsonl"], 3),
        (["peek", "./nowhere", "a text"], 2),
        (["shrink", "./nowhere", "--keep", "0.5"], 2),
        (["chat", "./nowhere"], 2),
        (["chat", "~nobody-here/x"], 2),
        (["export", "./nowhere", "--output", "there"], 2),
    ],
)
def test_help_and_what_is_refused_at_once_do_not_import_torch(arguments, code, tmp_path):
    write_recipe(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    program = (
        "import sys, limbeck.commands as c; sys.argv = ['limbeck', *sys.argv[1:]]; "
        "code = c.run(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=False, cwd=tmp_path)
    assert done.returncode == code


def test_the_version_needs_no_verb(tmp_path):
    assert limbeck("--version", cwd=tmp_path).stdout.startswith("limbeck ")


def test_an_option_of_the_recipe_with_dashes_is_answered_with_its_path(tmp_path):
    path = write_recipe(tmp_path)
    done = limbeck("distill", path.name, "--steps", "5", cwd=tmp_path, code=2)
    assert "optim.steps=VALUE" in " ".join(done.stderr.split())


def test_help_is_wrapped_by_the_terminal_alone():
    every = [commands.load_verb(name) for name in commands.VERBS]
    every += [each for group in every for each in getattr(group, "commands", {}).values()]
    assert max(len(each.help) for each in every) > 200
    assert [each.name for each in every if re.search(r"[^\n]\n[^\n]", each.help)] == []
