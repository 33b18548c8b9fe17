"""Resuming from a chosen checkpoint: the same student, and nothing is lost."""

import shutil

import pytest

import limbeck
from limbeck.distributed import prune
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.directory import roll_back
from limbeck.experiment.trials import trials_of
from tests.commands.processes import limbeck as command
from tests.experiment.test_stages import write_stages
from tests.experiment.tiny_run import steps_of, write_recipe

BASELINE = "evaluate.baseline=cross_entropy"
STEPS = ["step-000004", "step-000008", "step-000012"]


class Copied:
    """A copy of a run of 12 steps, saved every 4."""

    def __init__(self, recipe, folder):
        self.recipe, self.folder = recipe, folder
        self.checkpoints = folder / "checkpoints"
        self.baseline = folder / "stages" / "cross_entropy" / "checkpoints"

    def config(self, *changes):
        return limbeck.load(self.recipe, [f"output={self.folder}", *changes])

    def resume_from(self, step, *changes):
        with limbeck.assemble(self.config(*changes)) as run:
            return run.train(resume_from=step)

    def files(self):
        """Every file but the lock, and its contents."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(p): p.read_bytes() for p in paths if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    path = write_recipe(
        folder, optim={"steps": 12}, checkpoint={"every": 4, "keep": 3}, evaluate={"every": 4}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder / "cache"))
        with limbeck.assemble(limbeck.load(path)) as run:
            run.train()
    return folder


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(made / "cache"))
    return Copied(made / "recipe.yaml", shutil.copytree(made / "run", tmp_path / "run"))


def names_in(folder, pattern):
    return sorted(path.name for path in folder.glob(pattern))


def test_a_run_resumed_from_its_first_checkpoint_ends_as_the_same_bytes(copied, made, capfd):
    folder, whole = copied.folder, made / "run"
    (folder / "report.html").unlink()
    (folder / "evaluation.json").unlink()
    (folder / "student" / "model.safetensors").write_bytes(b"an older student")
    copied.resume_from(4)
    assert names_in(copied.checkpoints, "replaced-*") == [], "the run has come as far again"
    for name in ("student/model.safetensors", "scores.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    losses = [[(r["step"], r["loss"]) for r in steps_of(each)] for each in (folder, whole)]
    assert losses[0] == losses[1]
    assert "resumed at 4" in (folder / "metrics.jsonl").read_text()
    assert names_in(copied.checkpoints, "step-*") == STEPS
    told = capfd.readouterr().err
    assert f"a later checkpoint is kept as {copied.checkpoints}/replaced-step-000012-0" in told
    assert (folder / "report.html").exists()
    assert (folder / "evaluation.json").exists()


def test_replaced_checkpoints_stay_until_the_run_has_come_as_far_again(copied, made):
    trials = trials_of(copied.config())
    roll_back(trials, 4)
    aside = [copied.checkpoints / f"replaced-{step}-0" for step in STEPS[1:]]
    for path, step in zip(aside, STEPS[1:], strict=True):
        for file in path.iterdir():
            kept = made / "run" / "checkpoints" / step / file.name
            assert file.read_bytes() == kept.read_bytes()
    for step, left in ((STEPS[0], aside), (STEPS[1], aside[1:]), (STEPS[2], [])):
        newest = copied.checkpoints / step
        if not newest.exists():
            shutil.copytree(made / "run" / "checkpoints" / step, newest)
        prune(copied.checkpoints, newest, 3, ())
        assert sorted(copied.checkpoints.glob("replaced-*")) == left


def test_every_student_is_rolled_back_and_a_second_time_replaces_nothing(copied):
    shutil.copytree(copied.checkpoints, copied.baseline)
    trials = trials_of(copied.config(BASELINE))
    roll_back(trials, 4)
    for each in (copied.checkpoints, copied.baseline):
        assert names_in(each, "*") == [f"replaced-{step}-0" for step in STEPS[1:]] + STEPS[:1]
    assert not copied.folder.joinpath("scores.json").exists()
    shutil.copytree(copied.baseline / "replaced-step-000012-0", copied.baseline / STEPS[2])
    assert roll_back(trials, 4) == [copied.baseline / "replaced-step-000012-1"]
    assert len(names_in(copied.baseline, "replaced-*")) == 3


def test_a_step_without_a_checkpoint_is_refused_with_the_list_and_nothing_changes(copied):
    shutil.copytree(copied.checkpoints / STEPS[1], copied.baseline / STEPS[1])
    before = copied.files()
    with pytest.raises(
        ConfigError, match=r"checkpoint of step 5\.(?s:.*)run/checkpoints: 4, 8, 12"
    ):
        copied.resume_from(5, "optim.steps=20")
    with pytest.raises(ConfigError, match=r"cross_entropy/checkpoints: 8$"):
        copied.resume_from(4, BASELINE)
    assert copied.files() == before


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(copied):
    state = copied.checkpoints / STEPS[0] / "state.json"
    state.write_text(state.read_text().replace("1", "2", 1))
    before = copied.files()
    with pytest.raises(DataError, match="step-000004 must be a whole checkpoint") as told:
        copied.resume_from(4)
    assert told.value.exit_code == 3
    assert copied.files() == before


def test_a_recipe_with_stages_is_refused(tmp_path):
    write_stages(tmp_path)
    told = command("distill", "recipe.yaml", "--resume-from", "4", cwd=tmp_path, code=2)
    assert "--resume-from must be used on a recipe without stages" in told.stderr


def test_a_folder_without_a_run_is_refused(tmp_path):
    write_recipe(tmp_path)
    told = command("distill", "recipe.yaml", "--resume-from", "4", cwd=tmp_path, code=2)
    assert "run/checkpoints: none" in told.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()
