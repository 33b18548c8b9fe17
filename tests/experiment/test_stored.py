"""Runs that learn from a store: what they need, what they refuse, what they do not load."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import limbeck
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import load
from limbeck.experiment.shrink import open_shrink, save_shrunk, shrink
from limbeck.models import ModelSource
from limbeck.store import Store
from tests.experiment.recordings import from_store, record, recorded
from tests.experiment.tiny_run import steps_of, write_model, write_texts
from tests.tokenizers.small import edited, small

HIDDEN = {"type": "hidden"}
TOP_K = {"type": "top_k", "k": 16, "temperatures": [2.0, 1.0]}
SAMPLES = {"type": "samples", "num_draws": 20, "temperature": 1.0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def run(path, overrides, **options):
    with limbeck.assemble(load(path, overrides)) as whole:
        return whole.train(**options)


def test_a_run_from_exact_hidden_states_is_the_online_run(tmp_path):
    path = recorded(tmp_path, HIDDEN, data={"pack": False}, memory={"micro_batch": 1})
    online = run(path, ["evaluate.baseline=cross_entropy", f"output={tmp_path / 'online'}"])
    overrides = [*from_store(tmp_path), "evaluate.baseline=cross_entropy"]
    stored = run(path, overrides)
    assert [r["loss"] for r in steps_of(tmp_path / "run")] == [
        r["loss"] for r in steps_of(tmp_path / "online")
    ]
    mine, theirs = (o.student / "model.safetensors" for o in (stored, online))
    assert mine.read_bytes() == theirs.read_bytes()
    for trial, figures in online.evaluation["trials"].items():
        for name, figure in figures.items():
            assert stored.evaluation["trials"][trial][name] == pytest.approx(figure, rel=1e-3)
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["teacher"]["recorded"]["form"] == HIDDEN | {"precision": "exact"}
    assert provenance["teacher"]["weights_sha256"]
    assert stored.report.exists()
    with limbeck.assemble(load(path, overrides)) as whole:
        assert whole.evaluate(stored.student)["trials"]["distilled"]["forward_kl"]["value"] > 0


@pytest.mark.parametrize(
    ("form", "metrics"),
    [(TOP_K, {"forward_kl", "reverse_kl", "total_variation"}), (SAMPLES, {"forward_kl"})],
    ids=["top_k", "samples"],
)
def test_a_run_from_a_part_of_the_distribution_measures_what_that_part_holds(
    tmp_path, form, metrics
):
    path = recorded(tmp_path, form)
    temperature = f"objective.temperature={form.get('temperature', 2.0)}"
    baseline = "evaluate.baseline=cross_entropy"
    outcome = run(path, [*from_store(tmp_path), temperature, baseline])
    trials = outcome.evaluation["trials"]
    assert trials.keys() == {"initial", "distilled", "cross_entropy"}
    assert trials["distilled"]["forward_kl"]["value"] < trials["initial"]["forward_kl"]["value"]
    possible = {"forward_kl", "reverse_kl", "total_variation", "top1_agreement"}
    assert trials["distilled"].keys() & possible == metrics
    assert "<html" in outcome.report.read_text()


def refused(path, overrides, error, match):
    with pytest.raises(error, match=match), limbeck.assemble(load(path, overrides)) as whole:
        whole.train()
    assert not (path.parent / "run").exists()


def test_what_the_form_does_not_serve_is_refused_before_the_first_step(tmp_path):
    path = recorded(tmp_path, SAMPLES)
    store = from_store(tmp_path)
    options = [*store, "objective.temperature=2.0"]
    refused(path, options, ConfigError, "drawn at temperature 1.0, so they cannot be compared at")
    options = [*store, "objective.temperature=1.0", "objective.divergence=reverse_kl"]
    refused(path, options, ConfigError, "supports forward_kl only, and the objective uses")
    extra = "objective.extra=[{type: hidden_state, weight: 0.1, layer_map: uniform}]"
    options = [*store, "objective.temperature=1.0", extra]
    refused(path, options, ConfigError, r"reads the teacher's layers \[0, 3\].*holds layers none")


def test_a_temperature_of_any_step_that_was_not_recorded_is_refused_before_the_first_step(tmp_path):
    """Step 100 alone: neither the first, the middle nor the last of the run."""
    path = recorded(tmp_path, TOP_K | {"temperatures": [1.0]})
    schedule = "{type: table, values: {0: 1.0, 100: 2.0, 200: 1.0}}"
    options = [*from_store(tmp_path), f"objective.temperature={schedule}", "optim.steps=400"]
    refused(path, options, ConfigError, r"recorded at temperature 1\.0, so it cannot .*2\.0")
    schedule = "{type: cosine, from: 1.0, to: 2.0, steps: 50}"
    options = [*from_store(tmp_path), f"objective.temperature={schedule}", "optim.steps=400"]
    refused(path, options, ConfigError, r"recorded at temperature 1\.0")


def test_a_pruned_student_maps_to_its_kept_layers_with_a_recorded_teacher(tmp_path):
    """As beside the teacher's model: the same map, the same losses, the same student."""
    path = recorded(tmp_path, HIDDEN, (0, 1, 3), data={"pack": False}, memory={"micro_batch": 1})
    setup = open_shrink(
        ModelSource(str(tmp_path / "teacher")),
        kind="text",
        data=str(tmp_path / "train.jsonl"),
        tokens=64,
        device=torch.device("cpu"),
    )
    spec = {"type": "depth", "layers": (0, 1, 3)}
    save_shrunk(setup, shrink(setup, spec), tmp_path / "shrunk")
    options = [
        f"student={{type: pretrained, path: {tmp_path / 'shrunk'}}}",
        "objective.extra=[{type: hidden_state, weight: 0.5, layer_map: surviving}]",
    ]
    run(path, [*options, f"output={tmp_path / 'online'}"])
    stored = [*options, f"teacher={{type: stored, path: {tmp_path / 'store'}}}"]
    with limbeck.assemble(load(path, stored)) as whole:
        assert whole.parts.shapes.layer_map.pairs == ((0, 0), (1, 1), (2, 3))
        whole.train()
    assert [r["loss"] for r in steps_of(tmp_path / "run")] == [
        r["loss"] for r in steps_of(tmp_path / "online")
    ]
    uniform = [*stored, f"student.path={tmp_path / 'plain'}", f"output={tmp_path / 'other'}"]
    write_model(tmp_path / "plain", rows=len(small()), layers=2, seed=5)
    with limbeck.assemble(load(path, uniform)) as whole:
        assert whole.parts.shapes.layer_map.pairs == ((0, 0), (1, 3)), "spread where none survived"


@pytest.mark.parametrize(
    "form",
    [TOP_K | {"temperatures": [2.0]}, SAMPLES | {"temperature": 2.0}],
    ids=lambda f: f["type"],
)
def test_a_store_that_cannot_be_measured_against_is_refused_before_the_first_step(tmp_path, form):
    path = recorded(tmp_path, form)
    told = "evaluate.data: students are measured at temperature 1, which the store"
    refused(path, from_store(tmp_path), ConfigError, told)
    outcome = run(path, [*from_store(tmp_path), "evaluate.data=null"])
    assert outcome.student.exists()


def test_a_changed_document_is_missing_and_named(tmp_path):
    path = recorded(tmp_path, TOP_K)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"text": json.loads(lines[2])["text"] + " drop"})
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    told = r"data: every window must be in the store .*, and 1 of \d+ are not; .* train.jsonl:3\."
    refused(path, from_store(tmp_path), DataError, told)


def test_another_sequence_length_and_other_held_out_text_are_named(tmp_path):
    path = recorded(tmp_path, TOP_K)
    options = [*from_store(tmp_path), "data.sequence_length=31"]
    refused(path, options, DataError, r"sequence_length: 32 in the store, 31 wanted")
    other = write_texts(tmp_path / "other.jsonl", 12, seed=9)
    options = [*from_store(tmp_path), f"evaluate.data={other}"]
    refused(path, options, DataError, r"evaluate.data: every window must be in the store")


def test_a_student_with_another_tokenizer_is_refused(tmp_path):
    path = recorded(tmp_path, TOP_K)

    def other_split(tree):
        tree["pre_tokenizer"]["add_prefix_space"] = True

    student = write_model(tmp_path / "student", rows=len(small()), layers=2, seed=5)
    edited(other_split).save_pretrained(student)
    store = from_store(tmp_path)[0]
    recipe = json.loads(path.read_text())
    recipe["student"] = {"type": "pretrained", "path": str(student)}
    path.write_text(json.dumps(recipe))
    refused(path, [store], ConfigError, r"tokenizer: '\w+' in the store, '\w+' wanted")


def test_chats_through_another_template_are_refused(tmp_path):
    chat = "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": "a still"}, {"role": "assistant", "content": w}]}
        for w in ("boils the wash", "catches what rises", "one drop", "cold water", "copper neck")
    ]
    for name in ("train.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    teacher = write_model(tmp_path / "teacher", rows=len(small()))
    small(template=chat).save_pretrained(teacher)
    path = recorded(tmp_path, TOP_K, data={"type": "chat"}, evaluate={"continuations": 0})
    assert Store.open(tmp_path / "store").num_scored
    student = write_model(tmp_path / "student", rows=len(small()), layers=2, seed=5)
    small(template=chat.replace("role", "role|upper")).save_pretrained(student)
    recipe = json.loads(path.read_text())
    recipe["student"] = {"type": "pretrained", "path": str(student)}
    path.write_text(json.dumps(recipe))
    store = from_store(tmp_path)[0]
    refused(path, [store], ConfigError, r"does not: template: '\w+' in the store, '\w+' wanted")


def test_a_store_without_its_tokenizer_or_a_shard_is_refused(tmp_path):
    path = recorded(tmp_path, TOP_K)
    overrides = from_store(tmp_path)
    (tmp_path / "store" / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(path, overrides, DataError, "must have the teacher's tokenizer in")
    shutil.rmtree(tmp_path / "store" / "shard-00001")
    refused(path, overrides, DataError, "1 are missing or damaged: 1. Finish the recording")


def test_check_and_pruning_without_teacher_weights_say_what_to_do(tmp_path):
    path = recorded(tmp_path, TOP_K)
    store = from_store(tmp_path)[0]
    refused(path, [store], ConfigError, "a recorded teacher has none here")
    from limbeck.commands.check import check

    with pytest.raises(ConfigError, match="check needs the weights of the teacher's model"):
        check(path, from_store(tmp_path))


WATCHED = """
import gc, sys
import limbeck
from limbeck.models import CausalLM
from limbeck.experiment import load
from limbeck.teachers import find_local
with limbeck.assemble(load("recipe.yaml", sys.argv[1:])) as run:
    run.train()
    models = [o for o in gc.get_objects() if isinstance(o, CausalLM)]
    assert find_local(run.parts.teacher) is None
    print(max((m.num_layers for m in models), default=0))
"""


def test_the_process_of_a_run_does_not_hold_the_teacher(tmp_path):
    """Its folder is not even there; the student is one saved before."""
    recorded(tmp_path, HIDDEN)
    student = write_model(tmp_path / "student", rows=len(small()), layers=2, seed=5)
    shutil.rmtree(tmp_path / "teacher")
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["student"] = {"type": "pretrained", "path": str(student)}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, from_store(tmp_path)[0]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 2


@pytest.mark.slow
def test_two_ranks_learn_from_a_store_as_one_process_does_and_record_as_one_does(tmp_path):
    path = recorded(tmp_path, TOP_K, optim={"tokens_per_step": 96}, memory={"micro_batch": 1})
    overrides = from_store(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def on_two(*arguments):
        done = subprocess.run(
            [*launcher, "-m", "limbeck", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr

    run(path, [*overrides, f"output={tmp_path / 'one'}"])
    on_two("distill", "recipe.yaml", *overrides)
    for record_, expected in zip(
        steps_of(tmp_path / "run"), steps_of(tmp_path / "one"), strict=True
    ):
        for name in ("loss", "divergence", "grad_norm"):
            assert record_[name] == pytest.approx(expected[name], rel=1e-4)
    on_two("record", "recipe.yaml", "--no-budget", f"record.output={tmp_path / 'again'}")
    for shard in (tmp_path / "store").glob("shard-*"):
        for file in shard.iterdir():
            assert file.read_bytes() == (tmp_path / "again" / shard.name / file.name).read_bytes()
    assert record(load(path)).recorded == 0
