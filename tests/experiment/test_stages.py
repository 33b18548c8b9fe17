"""Several runs in one recipe: a teacher that is corrected, and a cascade."""

import json
import signal
import time

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.errors import ConfigError
from limbeck.experiment import load_stages, run_stages
from tests.experiment.test_processes import start
from tests.experiment.tiny_run import steps_of, write_recipe

CORRECTION = {"name": "correction", "student": {"type": "copy"}, "objective": {"alpha": 0.0}}
CASCADE = [
    CORRECTION,
    {
        "name": "three",
        "teacher": {"path": "stage:correction"},
        "student": {"type": "depth", "keep": 3},
    },
    {
        "name": "two",
        "teacher": {"path": "stage:three"},
        "student": {"type": "depth", "drop": [1]},
        "optim": {"steps": 4},
    },
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def write_stages(folder, stages=CASCADE, **changes):
    folder.mkdir(exist_ok=True)
    recipe = json.loads(write_recipe(folder, **changes).read_text())
    recipe["stages"] = stages
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def run(path, *overrides, **options):
    found = {}
    run_stages(load_stages(path, overrides), lambda s, r: found.update({s.name: r}), **options)
    return found


def folder_of(path, name):
    return path.parent / "run" / "stages" / name


def provenance(path, name):
    return json.loads((folder_of(path, name) / "provenance.json").read_text())


def test_each_stage_learns_from_the_student_before_it(tmp_path):
    path = write_stages(tmp_path)
    found = run(path)
    assert list(found) == ["correction", "three", "two"]
    layers = [
        AutoModelForCausalLM.from_pretrained(each.student).config.num_hidden_layers
        for each in found.values()
    ]
    assert layers == [4, 3, 2]
    teachers = [provenance(path, name)["teacher"] for name in found]
    assert teachers[0]["name"] == str(tmp_path / "teacher")
    assert teachers[1]["name"] == str(folder_of(path, "correction") / "student")
    assert teachers[2]["layers"] == 3
    assert len({each["weights_sha256"] for each in teachers}) == 3
    assert [len(steps_of(folder_of(path, name))) for name in found] == [6, 6, 4]
    corrected = found["correction"].evaluation["trials"]
    assert (
        corrected["distilled"]["cross_entropy"]["value"]
        < corrected["teacher"]["cross_entropy"]["value"]
    )
    assert "divergence" not in steps_of(folder_of(path, "correction"))[0]
    assert not (tmp_path / "run" / "student").exists()


def test_the_first_teacher_may_teach_throughout(tmp_path):
    stages = [
        {"name": "three", "student": {"type": "depth", "keep": 3}},
        {"name": "two", "student": {"type": "depth", "keep": 2, "path": "stage:three"}},
    ]
    path = write_stages(tmp_path, stages)
    run(path)
    first, second = (provenance(path, name) for name in ("three", "two"))
    assert first["teacher"] == second["teacher"]
    assert second["student"]["cut_from"]["layers"] == 3


@pytest.mark.long
def test_an_interrupted_cascade_resumes_to_the_same_bits(tmp_path, monkeypatch):
    wanted = run(write_stages(tmp_path / "whole"))["two"].student / "model.safetensors"
    path = write_stages(tmp_path / "parts")
    for life, done in ((5, ()), (5, ("correction",)), (7, ("correction", "three"))):
        with monkeypatch.context() as patch:
            patch.setattr("limbeck.experiment.trials.train", stopping_in_life(life))
            with pytest.raises(KeyboardInterrupt):
                run(path, resume=True)
        assert tuple(s.name for s in load_stages(path) if s.is_done) == done
    before = (folder_of(path, "three") / "student" / "model.safetensors").stat().st_mtime_ns
    found = run(path, resume=True)
    after = (folder_of(path, "three") / "student" / "model.safetensors").stat().st_mtime_ns
    assert before == after, "what is done stays done"
    assert list(found) == ["correction", "three", "two"]
    # The teacher is another folder in the other run, and the weights are the same all the same.
    assert (found["two"].student / "model.safetensors").read_bytes() == wanted.read_bytes()
    assert load_file(wanted).keys()


def stopping_in_life(steps):
    """The real training, cut off after so many steps over all stages of this life."""
    from limbeck.train import train
    from tests.train.toy import Listener

    left = [steps]

    def stopped(setup):
        def hear(record):
            if record["kind"] == "step":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt

        object.__setattr__(setup, "sinks", [*setup.sinks, Listener(hear)])
        return train(setup)

    return stopped


def wait_for(process, metrics, step):
    """Until the metrics of a stage say that it has taken so many steps."""
    deadline = time.monotonic() + 300
    while f'"step": {step},' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
def test_a_killed_cascade_resumes_by_the_same_command(tmp_path):
    path = write_stages(tmp_path / "killed", optim={"steps": 40}, checkpoint={"every": 4})
    for name, step in (("correction", 9), ("two", 2)):
        process = start(path.parent, "--resume")
        wait_for(process, folder_of(path, name) / "metrics.jsonl", step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(path.parent, "--resume")
    told, _ = last.communicate(timeout=300)
    assert last.returncode == 0, told
    other = write_stages(tmp_path / "whole", optim={"steps": 40}, checkpoint={"every": 4})
    wanted = run(other)["two"].student
    found = folder_of(path, "two") / "student"
    names = ("model.safetensors", "config.json")
    assert [(found / n).read_bytes() for n in names] == [(wanted / n).read_bytes() for n in names]


def test_another_recipe_does_not_resume_even_after_a_finished_stage(tmp_path):
    path = write_stages(tmp_path, CASCADE[:2])
    run(path)
    with pytest.raises(ConfigError, match=r"already holds stages \(correction, three\).*--resume"):
        run(path)
    with pytest.raises(ConfigError, match=r"recipe\.objective\.temperature: was 2\.0, is 3\.0"):
        run(path, "objective.temperature=3.0", resume=True)
    again = run(path, "objective.temperature=3.0", overwrite=True)
    assert list(again) == ["correction", "three"]


def test_a_run_without_stages_is_not_mixed_with_one(tmp_path):
    path = write_stages(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 0")
    with pytest.raises(ConfigError, match="already holds a run without stages"):
        run(path, resume=True)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"stages: must be a list of stages, at least one, got \[\]"),
        ([{"optim": {}}], r"stages\[0\]: must be a mapping with a name"),
        ([{"name": "a/b"}], r"stages\[0\]\.name: must be letters, digits.*got 'a/b'"),
        ([{"name": "a"}, {"name": "a"}], r"stages\[1\]\.name: must be no other stage's"),
        ([{"name": "a", "output": "x"}], r"stages\[0\]\.output: is an option of the whole"),
        (
            [{"name": "a", "teacher": {"path": "stage:a"}}],
            r"stages\[0\]\.teacher\.path: must refer to an earlier stage, got 'stage:a'\. It is",
        ),
        (
            [{"name": "a"}, {"name": "b", "student": {"path": "stage:c"}}],
            r"stages\[1\]\.student\.path: must refer.*Earlier stages: a\.",
        ),
        (
            [{"name": "a"}, {"name": "b", "optim": {"stepz": 1}}],
            r"stages\[1\]\.optim\.stepz: no such option \(did you mean 'steps'\?\)",
        ),
    ],
)
def test_wrong_stages_are_listed_before_a_model_loads(stages, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_stages(write_stages(tmp_path, stages))


def test_an_error_in_the_shared_options_is_reported_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_stages(write_stages(tmp_path), ["optim.warmup_steps=50", "objective.alpha=2"])
    lines = str(error.value).splitlines()[1:]
    assert [line.strip().partition(":")[0] for line in lines] == [
        "stages[0].optim.warmup_steps",
        "stages[1].objective.alpha",
        "stages[1].optim.warmup_steps",
        "stages[2].objective.alpha",
        "stages[2].optim.warmup_steps",
    ]
    with pytest.raises(ConfigError, match=r"run:\n  optim\.warmup_steps: must be less than"):
        load_stages(write_stages(tmp_path, CASCADE[:2]), ["optim.warmup_steps=50"])


def test_a_command_of_one_run_says_that_the_recipe_has_several(tmp_path):
    with pytest.raises(ConfigError, match=r"has stages, and one run is asked for.*distill"):
        limbeck.load(write_stages(tmp_path))


def test_a_recipe_without_stages_has_none(tmp_path):
    assert load_stages(write_recipe(tmp_path)) == ()
