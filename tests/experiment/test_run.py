"""The main job from a recipe to a report, on tiny models that take the real path."""

import gc
import json
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.config import read
from limbeck.errors import ConfigError, DataError
from limbeck.experiment.parts import Parts
from limbeck.files import manifest
from limbeck.models import Distiller
from tests.experiment.tiny_run import run, steps_of, write_model, write_recipe, write_texts
from tests.tokenizers.small import edited, small

OPEN_ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("a still boils", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
assert "limbeck" not in sys.modules
print(model.config.num_hidden_layers, out.shape[1] - ids.shape[1])
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def swap_two_ids(tree):
    vocabulary = tree["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def test_a_step_logs_alpha_temperature_passes_and_memory(tmp_path):
    alpha = "objective.alpha={type: linear, from: 1.0, to: 0.5, steps: 1}"
    run(write_recipe(tmp_path), "evaluate.data=null", "optim.steps=2", alpha)
    steps = steps_of(tmp_path / "run")
    assert [record["alpha"] for record in steps] == [1.0, 0.5]
    assert [record["temperature"] for record in steps] == [2.0, 2.0]
    assert 0 < steps[0]["epoch"] == steps[1]["epoch"] / 2
    assert all(record["memory_bytes"] > 1 << 20 for record in steps)


def test_a_recipe_becomes_a_student_a_table_and_a_report(tmp_path):
    outcome = run(write_recipe(tmp_path), "evaluate.baseline=cross_entropy")
    trials = outcome.evaluation["trials"]
    assert trials.keys() == {"initial", "distilled", "cross_entropy", "teacher"}
    assert trials["distilled"]["forward_kl"]["value"] < trials["initial"]["forward_kl"]["value"]
    assert trials["teacher"]["forward_kl"]["value"] == 0
    assert outcome.evaluation["difference"]["forward_kl"].keys() == {"value", "low", "high"}
    assert outcome.evaluation == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert outcome.report is not None
    assert "<html" in outcome.report.read_text()
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["student"]["layers_kept"] == [0, 3]
    assert provenance["timing"].keys() == {"training_distilled", "training_cross_entropy"}
    assert "step 6/6" in (tmp_path / "run" / "log.txt").read_text()
    assert len(steps_of(tmp_path / "run")) == 6
    stage = steps_of(tmp_path / "run" / "stages" / "cross_entropy")
    assert "divergence" not in stage[0]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ELSEWHERE, outcome.student],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.split() == ["2", "4"]


def test_a_shuffled_teacher_is_a_further_student_that_ends_farther_away(tmp_path):
    path = write_recipe(tmp_path, optim={"learning_rate": 0.01}, objective={"alpha": 1.0})
    outcome = run(path, "evaluate.controls=[shuffled]", "memory.micro_batch=1")
    trials = outcome.evaluation["trials"]
    kl = {name: trials[name]["forward_kl"]["value"] for name in ("distilled", "shuffled")}
    farther = outcome.evaluation["control"]["shuffled"]
    assert farther["value"] == pytest.approx(kl["shuffled"] - kl["distilled"])
    assert farther["low"] > 0
    assert "Shuffled teacher" in outcome.report.read_text()
    with pytest.raises(ConfigError, match="exchanges rows within a step"):
        run(path, "evaluate.controls=[shuffled]", "optim.tokens_per_step=32")


def test_a_baseline_trains_for_as_much_time_as_the_distilled_student(tmp_path):
    path = write_recipe(tmp_path, objective={"alpha": 1.0})
    with pytest.raises(ConfigError, match="equal_time is timed by the baseline"):
        run(path, "evaluate.controls=[equal_time]")
    both = ("evaluate.baseline=cross_entropy", "evaluate.controls=[equal_time]")
    with pytest.raises(ConfigError, match="and it has a grid"):
        run(path, *both, "evaluate.baseline_learning_rate=[0.01, 0.02]")
    outcome = run(path, *both)
    ours, text, longer = (
        steps_of(tmp_path / "run" / folder)
        for folder in ("", "stages/cross_entropy", "stages/equal_time")
    )
    assert len(ours) == len(text)
    fitting = round(len(text) * ours[-1]["seconds"] / text[-1]["seconds"])
    assert len(longer) == max(fitting, 1)
    assert {line["alpha"] for line in longer} == {0.0}
    trials = outcome.evaluation["trials"]
    kl = {name: trials[name]["forward_kl"]["value"] for name in ("distilled", "equal_time")}
    farther = outcome.evaluation["control"]["equal_time"]
    assert farther["value"] == pytest.approx(kl["equal_time"] - kl["distilled"])
    assert "for as much time" in outcome.report.read_text()


def test_a_control_without_extra_terms_tells_what_they_brought(tmp_path):
    terms = [{"type": "hidden_state", "loss": "cosine", "weight": 5.0}]
    path = write_recipe(tmp_path, objective={"alpha": 1.0, "extra": terms})
    outcome = run(path, "evaluate.controls=[without_extra]")
    ours, plain = (steps_of(tmp_path / "run" / at) for at in ("", "stages/without_extra"))
    assert ours[0]["divergence"] == plain[0]["divergence"]
    assert ours[0]["loss"] > plain[0]["loss"] == plain[0]["divergence"]
    trials = outcome.evaluation["trials"]
    kl = {name: trials[name]["forward_kl"]["value"] for name in ("distilled", "without_extra")}
    farther = outcome.evaluation["control"]["without_extra"]
    assert farther["value"] == pytest.approx(kl["without_extra"] - kl["distilled"])
    assert "Without extra terms" in outcome.report.read_text()
    with pytest.raises(ConfigError, match=r"without_extra trains without objective\.extra"):
        run(path, "evaluate.controls=[without_extra]", "objective.extra=[]")


def test_both_trials_read_the_same_tokens_in_the_same_order(tmp_path):
    run(write_recipe(tmp_path), "evaluate.baseline=cross_entropy", "objective.alpha=0.0")
    main = steps_of(tmp_path / "run")
    anchor = steps_of(tmp_path / "run" / "stages" / "cross_entropy")
    assert [r["cross_entropy"] for r in main] == [r["cross_entropy"] for r in anchor]


def test_the_memory_of_a_trial_is_released_before_the_next_one_starts(tmp_path, monkeypatch):
    trained: list[weakref.ref[Distiller]] = []
    make = Parts.distiller

    def make_after_the_last(self, student, objective):
        assert [each for each in trained if each() is not None] == []
        distiller = make(self, student, objective)
        trained.append(weakref.ref(distiller))
        return distiller

    monkeypatch.setattr(Parts, "distiller", make_after_the_last)
    gc.disable()
    try:
        run(write_recipe(tmp_path), "optim.learning_rate=[1e-3, 3e-3]", "optim.steps=2")
    finally:
        gc.enable()
    assert len(trained) == 2


def test_a_grid_keeps_the_rate_with_the_lowest_kl(tmp_path):
    path = write_recipe(tmp_path)
    outcome = run(path, "optim.learning_rate=[1e-6, 3e-3]")
    assert outcome.evaluation["learning_rate"] == {"distilled": 3e-3}
    kept = (outcome.student / "model.safetensors").read_bytes()
    stages = tmp_path / "run" / "stages"
    assert kept == (stages / "distilled-0.003" / "student" / "model.safetensors").read_bytes()
    assert kept != (stages / "distilled-1e-06" / "student" / "model.safetensors").read_bytes()


def test_the_baseline_may_have_its_own_grid(tmp_path):
    outcome = run(
        write_recipe(tmp_path),
        "evaluate.baseline=cross_entropy",
        "evaluate.baseline_learning_rate=[1e-6, 1e-3]",
    )
    assert outcome.evaluation["learning_rate"] == {"distilled": 3e-3, "cross_entropy": 1e-3}


def test_the_baseline_is_chosen_by_what_it_minimises_and_reported_by_kl_too(tmp_path):
    """The text alone pulls a student away from its teacher: KL would choose the rate that learns
    least, and flatter distillation.
    """
    outcome = run(
        write_recipe(tmp_path),
        "evaluate.baseline=cross_entropy",
        "evaluate.baseline_learning_rate=[1e-6, 3e-3]",
        "optim.steps=12",
    )
    evaluation = outcome.evaluation
    assert evaluation["learning_rate"]["cross_entropy"] == 3e-3
    assert evaluation["selected_by"] == {
        "distilled": "forward_kl",
        "cross_entropy": "cross_entropy",
    }
    own, by_kl = (evaluation["trials"][k] for k in ("cross_entropy", "cross_entropy_by_kl"))
    assert own["cross_entropy"]["value"] < by_kl["cross_entropy"]["value"]
    assert own["forward_kl"]["value"] > by_kl["forward_kl"]["value"]


def test_the_best_student_of_a_grid_is_published_whole(tmp_path):
    outcome = run(write_recipe(tmp_path), "optim.learning_rate=[1e-6, 3e-3]")
    assert manifest(outcome.student) is not None


def test_a_run_of_epochs_is_the_run_of_their_steps_and_resumes(tmp_path):
    path = write_recipe(tmp_path)
    options = ("optim.steps=null", "optim.epochs=0.5", "evaluate.data=null")
    student = run(path, *options).student
    body = (student / "model.safetensors").read_bytes()
    steps = len(steps_of(tmp_path / "run"))
    saved = read(tmp_path / "run" / "recipe.yaml").optim
    assert (saved.steps, saved.epochs) == (steps, None)
    shutil.rmtree(student)
    assert (run(path, *options, resume=True).student / "model.safetensors").read_bytes() == body
    other = f"output={tmp_path / 'other'}"
    again = run(path, f"optim.steps={steps}", "evaluate.data=null", other)
    assert (again.student / "model.safetensors").read_bytes() == body


def test_resuming_a_finished_run_makes_a_missing_student_again(tmp_path):
    path = write_recipe(tmp_path)
    student = run(path).student
    body = (student / "model.safetensors").read_bytes()
    shutil.rmtree(student)
    assert (run(path, resume=True).student / "model.safetensors").read_bytes() == body


def test_a_finished_run_resumes_with_more_steps_and_becomes_the_run_of_all_of_them(tmp_path):
    path = write_recipe(tmp_path)
    options = ("optim.schedule=constant", "optim.warmup_steps=0", "evaluate.data=null")
    run(path, *options, "optim.steps=3")
    longer = run(path, *options, "optim.steps=6", resume=True)
    whole = run(path, *options, "optim.steps=6", f"output={tmp_path / 'whole'}")
    assert steps_of(tmp_path / "run")[-1]["loss"] == steps_of(tmp_path / "whole")[-1]["loss"]
    bodies = {(each.student / "model.safetensors").read_bytes() for each in (longer, whole)}
    assert len(bodies) == 1
    with pytest.raises(ConfigError, match=r"optim\.steps: was 6, is 4"):
        run(path, *options, "optim.steps=4", resume=True)


def test_a_student_is_saved_in_the_format_of_the_recipe_and_measured_as_it_is_saved(tmp_path):
    path = write_recipe(tmp_path)
    result = run(path, "checkpoint.student_dtype=bfloat16", "optim.steps=3")
    saved = load_file(result.student / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(result.student).dtype == torch.bfloat16
    figures = result.evaluation["trials"]["distilled"]
    with limbeck.assemble(limbeck.load(path)) as whole:
        again = whole.evaluate(result.student)["trials"]["distilled"]
    for name in ("forward_kl", "cross_entropy"):
        assert again[name]["value"] == pytest.approx(figures[name]["value"], rel=1e-6)
    lora = "trainable.lora={}"
    with pytest.raises(ConfigError, match=r"checkpoint\.student_dtype: must be float32 with"):
        limbeck.load(path, ["checkpoint.student_dtype=bfloat16", lora])


def test_a_finished_run_without_student_and_checkpoints_is_no_success(tmp_path):
    path = write_recipe(tmp_path)
    outcome = run(path)
    shutil.rmtree(outcome.student)
    shutil.rmtree(outcome.student.parent / "checkpoints")
    with pytest.raises(DataError, match=r"student is missing.*--overwrite"):
        run(path, resume=True)


def test_every_missing_path_is_named_before_any_weights_are_read(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    monkeypatch.setattr("limbeck.teachers.local.model_for", None)
    student = {"type": "pretrained", "path": str(tmp_path / "no-student")}
    wrong = [f"student={json.dumps(student)}", "data.path=none.jsonl", "evaluate.data=no.jsonl"]
    with pytest.raises(ConfigError) as error:
        run(path, f"teacher.path={tmp_path / 'no-teacher'}", *wrong)
    for option in ("teacher.path", "student.path", "data.path", "evaluate.data"):
        assert f"{option}: " in str(error.value)


def test_a_bad_first_row_of_the_held_out_text_is_refused_before_any_weights_are_read(
    tmp_path, monkeypatch
):
    path = write_recipe(tmp_path)
    monkeypatch.setattr("limbeck.teachers.local.model_for", None)
    (tmp_path / "bad.jsonl").write_text('{"body": "a still boils"}\n')
    with pytest.raises(DataError, match=r"(?s)evaluate\.data: .*column 'text' is missing"):
        run(path, f"evaluate.data={tmp_path / 'bad.jsonl'}")


def test_an_output_that_is_a_file_is_refused(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "afile").touch()
    with pytest.raises(ConfigError, match="output: must be a folder"):
        run(path, f"output={tmp_path / 'afile'}")


def test_the_report_compares_speed_and_size_in_one_data_type(tmp_path):
    path = write_recipe(tmp_path, teacher={"dtype": "bfloat16"})
    models = run(path).evaluation["models"]
    assert {each["dtype"] for each in models.values()} == {"bfloat16"}
    for each in models.values():
        assert each["bytes"] == 2 * each["parameters"]


def test_evaluating_the_finished_student_again_gives_the_same_figures(tmp_path):
    evaluate_again(tmp_path, allowed=1e-4)


def evaluate_again(tmp_path, allowed):
    path = write_recipe(tmp_path)
    first = run(path).evaluation
    with limbeck.assemble(limbeck.load(path)) as whole:
        again = whole.evaluate()
    assert again["trials"]["distilled"]["forward_kl"] == pytest.approx(
        first["trials"]["distilled"]["forward_kl"], rel=allowed
    )


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(384, 448), (448, 384)])
def test_padded_vocabularies_give_the_same_losses_as_unpadded_ones(
    tmp_path, student_rows, teacher_rows
):
    """Qwen2.5-7B has 152,064 rows for the tokens for which Qwen2.5-1.5B has 151,936."""
    from transformers import AutoModelForCausalLM

    real = len(small())
    found = []
    for name, rows_s, rows_t in (("plain", real, real), ("padded", student_rows, teacher_rows)):
        folder = tmp_path / name
        folder.mkdir()
        plain = tmp_path / "plain"
        like_t = like_s = None
        if name == "padded":
            like_t = AutoModelForCausalLM.from_pretrained(plain / "teacher")
            like_s = AutoModelForCausalLM.from_pretrained(plain / "student")
        write_model(folder / "teacher", rows=rows_t, like=like_t)
        write_model(folder / "student", rows=rows_s, layers=2, seed=5, like=like_s)
        write_texts(folder / "train.jsonl", 40, seed=1)
        write_texts(folder / "held.jsonl", 12, seed=2)
        student = {"type": "pretrained", "path": str(folder / "student"), "layers": None}
        path = write_recipe(folder)
        recipe = json.loads(path.read_text())
        recipe["student"] = {k: v for k, v in student.items() if v is not None}
        path.write_text(json.dumps(recipe))
        outcome = run(path)
        found.append(([r["loss"] for r in steps_of(folder / "run")], outcome.evaluation))
    (plain_losses, plain_eval), (padded_losses, padded_eval) = found
    assert padded_losses == pytest.approx(plain_losses, rel=1e-4)
    kl = "distilled"
    assert padded_eval["trials"][kl]["forward_kl"]["value"] == pytest.approx(
        plain_eval["trials"][kl]["forward_kl"]["value"], rel=1e-3
    )
    assert padded_eval["padded_mass"]["initial"] > 0
    assert plain_eval["padded_mass"]["initial"] == 0


def test_a_student_with_other_ids_for_the_same_tokens_is_refused(tmp_path):
    path = write_recipe(tmp_path)
    student = write_model(tmp_path / "other", rows=len(small()), layers=2)
    edited(swap_two_ids).save_pretrained(student)
    recipe = json.loads(path.read_text())
    recipe["student"] = {"type": "pretrained", "path": str(student)}
    path.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match="40"):
        run(path)
    assert not (tmp_path / "run").exists()


def test_a_directory_of_another_run_is_left_alone(tmp_path):
    path = write_recipe(tmp_path)
    run(path)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        run(path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert run(path, overwrite=True).student.exists()


def test_files_that_are_no_run_are_never_mixed_with_one(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("ten years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match="holds files that are not a run's"):
            run(path, **options)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "ten years of work"


def test_resuming_with_another_recipe_is_refused_with_the_difference(tmp_path):
    path = write_recipe(tmp_path)
    run(path)
    (tmp_path / "run" / "scores.json").unlink()
    with pytest.raises(ConfigError, match=r"temperature: was 2\.0, is 3\.0"):
        run(path, "objective.temperature=3.0", resume=True)


def test_resuming_in_another_number_format_is_refused(tmp_path):
    path = write_recipe(tmp_path)
    run(path, "parallel.shard=always")
    (tmp_path / "run" / "scores.json").unlink()
    with pytest.raises(ConfigError, match="compute_dtype: was 'float32', is 'bfloat16'"):
        run(path, "parallel.compute_dtype=bfloat16", resume=True)
    assert run(path, "parallel.timeout_s=99", resume=True).student.exists()


def test_resuming_with_another_plugin_is_refused(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("x = 1\n")
    path = write_recipe(tmp_path, plugins=["mine.py"])
    run(path)
    (tmp_path / "run" / "scores.json").unlink()
    plugin.write_text("x = 2\n")
    with pytest.raises(ConfigError, match=r"plugins\[0\]: was '\w{64}', is '\w{64}'"):
        run(path, resume=True)


def test_resuming_a_finished_run_trains_nothing_and_says_the_same(tmp_path):
    path = write_recipe(tmp_path)
    first = run(path)
    again = run(path, resume=True)
    assert again.evaluation["trials"] == first.evaluation["trials"]
    assert len(steps_of(tmp_path / "run")) == 6


def test_too_few_held_out_documents_are_said(tmp_path):
    path = write_recipe(tmp_path)
    write_texts(tmp_path / "held.jsonl", 2, seed=3)
    with pytest.raises(DataError, match="at least 4 documents"):
        run(path)


def test_without_held_out_text_there_is_a_student_and_no_figure(tmp_path):
    path = write_recipe(tmp_path)
    recipe = json.loads(path.read_text())
    del recipe["evaluate"]
    path.write_text(json.dumps(recipe))
    outcome = run(path)
    assert outcome.student.exists()
    assert outcome.evaluation["trials"] == {}
    assert outcome.report is not None
    assert "what it kept is not known" in outcome.report.read_text()


def test_refusing_to_resume_leaves_the_recipe_that_was_run(tmp_path):
    path = write_recipe(tmp_path)
    run(path)
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match="temperature"):
        run(path, "objective.temperature=3.0", resume=True)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    "change",
    ["evaluate.max_tokens=60", "evaluate.data=other.jsonl", "evaluate.max_documents=8"],
)
def test_figures_on_other_held_out_text_are_not_mixed_with_those_of_a_run(
    tmp_path, change, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path)
    write_texts(tmp_path / "other.jsonl", 12, seed=9)
    run(path)
    before = (tmp_path / "run" / "provenance.json").read_text()
    for more in ([], ["optim.steps=9"]):
        with pytest.raises(ConfigError, match="held-out text that its students were measured on"):
            run(path, change, *more, resume=True)
    assert (tmp_path / "run" / "provenance.json").read_text() == before
    moved = (tmp_path / "held.jsonl").rename(tmp_path / "moved.jsonl")
    run(path, f"evaluate.data={moved}", resume=True)


def test_a_learning_rate_that_diverges_does_not_end_the_others(tmp_path):
    rates = "optim.learning_rate=[0.003, 1e18]"
    outcome = run(write_recipe(tmp_path), rates, "optim.steps=4", "evaluate.every=2")
    assert outcome.evaluation["learning_rate"]["distilled"] == 0.003
    assert outcome.report.exists()


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path):
    path = write_recipe(tmp_path)
    run(path, "track=[tensorboard]")
    (tmp_path / "run" / "report.html").write_text("of the run before")
    stale = set((tmp_path / "run" / "tensorboard").iterdir())
    run(path, "track=[tensorboard]", overwrite=True)
    assert (tmp_path / "run" / "report.html").read_text() != "of the run before"
    assert not stale & set((tmp_path / "run" / "tensorboard").iterdir())


def test_a_student_that_starts_as_its_teacher_is_still_measured(tmp_path):
    path = write_recipe(tmp_path, student={"layers": [0, 1, 2, 3]})
    outcome = run(path, "optim.steps=2")
    assert outcome.evaluation["trials"]["initial"]["forward_kl"]["value"] == pytest.approx(
        0, abs=1e-6
    )
    assert "gap_recovered_percent" not in outcome.evaluation
    assert outcome.report is not None


def test_evaluating_a_student_of_other_ids_is_refused(tmp_path):
    path = write_recipe(tmp_path)
    other = write_model(tmp_path / "other", rows=len(small()), layers=2)
    edited(swap_two_ids).save_pretrained(other)
    with (
        limbeck.assemble(limbeck.load(path)) as whole,
        pytest.raises(ConfigError, match="must mean the same to student and teacher"),
    ):
        whole.evaluate(other)
