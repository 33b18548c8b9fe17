"""A recipe with a `rollout` section: text written in the run, from the recipe to the metrics."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.config import read
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.rollouts import cold_start_note
from limbeck.experiment.trials import trials_of
from limbeck.models import CausalLM
from tests.experiment.test_trainable import stopping_after
from tests.experiment.tiny_run import steps_of, write_model, write_recipe
from tests.tokenizers.small import small

ROLLOUT = {"tokens": 12, "prompt_tokens": 6}
ON_POLICY = {"alpha": 1.0, "temperature": 1.0, "divergence": "reverse_kl"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def recipe(folder, rollout=(), objective=ON_POLICY, **changes):
    path = write_recipe(folder, objective=objective, **changes)
    whole = json.loads(path.read_text()) | {"rollout": {**ROLLOUT, **dict(rollout)}}
    path.write_text(json.dumps(whole))
    return path


def run(path, *overrides, **options):
    with limbeck.assemble(limbeck.load(path, overrides)) as whole:
        return whole.train(**options)


def written(folder):
    """Rollouts of each step."""
    count = len(list((folder / "rollouts").iterdir()))
    files = [folder / "rollouts" / f"step-{step}.jsonl" for step in range(count)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def log(folder):
    return (folder / "run" / "log.txt").read_text()


def first_texts(folder):
    """Mean NLL of the first step's rollouts under the teacher."""
    teacher = CausalLM(AutoModelForCausalLM.from_pretrained(folder / "teacher").eval())
    sums = []
    for row in written(folder / "run")[0]:
        ids = torch.tensor([[*row["prompt_ids"], *row["token_ids"]]])
        logprobs = teacher.logits(ids).detach().log_softmax(-1)[0, len(row["prompt_ids"]) - 1 : -1]
        sums += logprobs.gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0].tolist()
    return -sum(sums) / len(sums)


def test_unlikely_first_texts_are_said_with_the_remedy():
    figures = {"rollout_teacher_logprob": -6.0}
    assert cold_start_note(figures, 5.5).endswith(
        "have 6.00 nats a token under the teacher, held-out text 5.50."
    )
    assert "train the student on fixed text first" in cold_start_note(figures, 3.0)
    assert cold_start_note(figures, None).endswith("6.00 nats a token under the teacher.")


def test_a_run_learns_from_an_estimate_on_drawn_tokens_alone(tmp_path):
    sampled = {
        **ON_POLICY,
        "divergence": None,
        "extra": [{"type": "sampled_reverse_kl", "weight": 1.0}],
    }
    run(recipe(tmp_path, {"position_decay": 0.9}, sampled, optim={"steps": 2}))
    for record in steps_of(tmp_path / "run"):
        assert "divergence" not in record
        assert record["loss"] == pytest.approx(record["sampled_reverse_kl"])


def test_a_sharded_student_writes_and_is_measured_before_it_learns(tmp_path):
    run(recipe(tmp_path, optim={"steps": 2}), "parallel.shard=always")
    assert "the student's first texts have" in log(tmp_path)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"alpha": 1.0, "divergence": None}, r"objective\.divergence: must not be null where"),
        ({"alpha": 0.5, "divergence": None, "temperature": 2.0}, r"objective\.temperature: soft"),
        (
            {"alpha": 1.0, "divergence": None, "extra": [{"type": "alm", "weight": 0.0}]},
            r"objective\.divergence: must not be null where",
        ),
    ],
)
def test_an_objective_without_a_divergence_needs_something_else(objective, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        limbeck.load(write_recipe(tmp_path, objective=objective))


def test_a_student_that_learns_from_the_text_alone_is_chosen_by_its_cross_entropy(tmp_path):
    for objective, metric in (
        ({"alpha": 0.5, "divergence": None}, "cross_entropy"),
        ({"alpha": 0.5}, "forward_kl"),
        ({"divergence": None, "extra": [{"type": "alm", "weight": 1.0}]}, "forward_kl"),
    ):
        (trial,) = trials_of(
            limbeck.load(write_recipe(tmp_path, objective={"temperature": 1.0, **objective}))
        )
        assert trial.selected_by == metric


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["trainable.lora={dropout: 0.1}"],
            r"trainable\.lora\.dropout: must be 0 with .* got 0\.1",
        ),
        (["rollout=null"], r"objective\.extra\[0\]: .*there is no `rollout`"),
        (["rollout.share=0.5"], r"rollout\.share: must be 1\.0 with .* got 0\.5"),
        (["rollout.from=teacher"], r"rollout\.from: must be student with .* got teacher"),
        (["rollout.top_p=0.9"], r"rollout\.top_p: must be 1\.0 with .* got 0\.9"),
        (["rollout.refresh=2"], r"rollout\.refresh: must be 1 with .* got 2"),
        (["rollout.sampling_temperature=2"], r"rollout\.sampling_temperature: must be 1\.0"),
    ],
)
def test_an_estimate_is_refused_for_tokens_that_the_student_did_not_just_draw(
    overrides, expected, tmp_path
):
    sampled = {**ON_POLICY, "extra": [{"type": "sampled_reverse_kl", "weight": 1.0}]}
    with pytest.raises(ConfigError, match=expected):
        limbeck.load(recipe(tmp_path, objective=sampled), overrides)


def test_a_run_learns_from_what_its_student_writes(tmp_path):
    outcome = run(
        recipe(tmp_path), "evaluate.baseline=cross_entropy", "evaluate.every=6", "optim.steps=3"
    )
    texts, steps = written(tmp_path / "run"), steps_of(tmp_path / "run")
    assert [len(rows) for rows in texts] == [4] * 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    documents = (tmp_path / "train.jsonl").read_text().splitlines()
    beginnings = {tuple(tokenizer(json.loads(d)["text"]).input_ids[:6]) for d in documents}
    tokens = 0
    for rows, record in zip(texts, steps, strict=True):
        assert {tuple(row["prompt_ids"]) for row in rows} <= beginnings
        tokens += sum(len(row["token_ids"]) for row in rows)
        assert record["tokens"] == tokens
        assert record["rollout_length"] == sum(len(row["token_ids"]) for row in rows) / 4
        assert 0 < record["rollout_entropy"] < 7
        assert record["rollout_staleness"] == 0
        assert 0 < record["rollout_seconds"] < record["seconds"]
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    measured = [record for record in records if record["kind"] == "evaluation"][-1]
    assert measured["rollout_teacher_logprob"] < 0 < measured["rollout_reverse_kl"]
    assert "rollout_forward_kl" in measured
    assert f"the student's first texts have {first_texts(tmp_path):.2f} nats a token" in log(
        tmp_path
    )
    figures = outcome.evaluation["trials"]
    assert figures["distilled"]["forward_kl"]["value"] != figures["initial"]["forward_kl"]["value"]
    anchor = tmp_path / "run" / "stages" / "cross_entropy"
    assert not (anchor / "rollouts").exists()
    assert "rollout_length" not in steps_of(anchor)[0]
    with limbeck.assemble(limbeck.load(write_recipe(tmp_path))) as plain:
        (batch,) = plain.parts.source(None).step(0, plain.world).cut(4)
        assert steps_of(anchor)[0]["tokens"] == batch.num_scored()
    notes = json.loads((tmp_path / "run" / "provenance.json").read_text())["vocabulary"]["notes"]
    assert "Rollouts continue 40 prompts of 6 tokens." in notes


def test_half_of_a_step_may_be_fixed_text_and_a_resume_in_a_block_is_exact(tmp_path, monkeypatch):
    folders = [tmp_path / "whole", tmp_path / "halves"]
    paths = []
    for folder in folders:
        folder.mkdir()
        held_out = {"data": None}
        paths.append(recipe(folder, {"share": 0.5, "refresh": 3}, evaluate=held_out))
    wanted = run(paths[0]).student / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("limbeck.experiment.trials.train", stopping_after(5))
        with pytest.raises(KeyboardInterrupt):
            run(paths[1])
    found = run(paths[1], resume=True).student / "model.safetensors"
    whole, halves = (folder / "run" for folder in folders)
    assert "resumed at 4" in (halves / "metrics.jsonl").read_text()
    assert found.read_bytes() == wanted.read_bytes()
    assert [len(rows) for rows in written(whole)] == [2] * 6
    assert written(halves) == written(whole)
    assert [record["rollout_staleness"] for record in steps_of(halves)] == [0, 1, 2] * 2
    for one, other in zip(steps_of(halves), steps_of(whole), strict=True):
        same = [name for name in one if "second" not in name and name != "memory_bytes"]
        assert [one[name] for name in same] == [other[name] for name in same]
        assert one["rollout_length"] <= 12 < one["tokens"] / one["step"] / 4


def test_a_teacher_may_write_for_a_student_that_learns_its_tokens(tmp_path):
    """Sequence-level distillation: cross-entropy on a quarter of the teacher's text."""
    changes = {"optim": {"steps": 2}, "evaluate": {"data": None}, "data": {"type": "auto"}}
    rollout = {"from": "teacher", "scored": [0.25, 0.5]}
    path = recipe(tmp_path, rollout, {**ON_POLICY, "alpha": 0.0}, **changes)
    run(path)
    lengths = [len(row["token_ids"]) for row in written(tmp_path / "run")[0]]
    assert lengths == [12] * 4
    assert steps_of(tmp_path / "run")[0]["tokens"] == 4 * 3
    teacher = CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval())
    for row in written(tmp_path / "run")[0]:
        ids = torch.tensor([[*row["prompt_ids"], *row["token_ids"]]])
        logits = teacher.logits(ids).detach()
        logprobs = logits.log_softmax(-1)[0, len(row["prompt_ids"]) - 1 : -1]
        expected = logprobs.gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0]
        assert row["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
    saved = tmp_path / "run" / "recipe.yaml"
    assert read(saved).rollout == limbeck.load(path).rollout
    assert "from: teacher" in saved.read_text()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.alpha=0.9"], r"objective\.alpha: must be 1 in every step, got 0\.9: with"),
        (
            ["objective.alpha={type: linear, from: 1.0, to: 0.5, steps: 4}"],
            r"objective\.alpha: must be 1 .* got 0\.5",
        ),
        (
            ["objective.extra=[{type: cross_entropy, weight: 0.1, name: text}]"],
            r"objective\.extra\[0\]: .* own samples",
        ),
        (["rollout.share=0.1"], r"rollout\.share: must be a part of the 4 rows .* 0\.1 = 0 rows"),
        (["rollout.share=0.9"], r"rollout\.share: .* 0\.9 = 4 rows"),
        (["rollout.share=0"], r"rollout\.share: must be greater than 0"),
        (["rollout.tokens=27"], r"rollout\.tokens: a prompt of 6 tokens .* = 32, got 27"),
        (["rollout.refresh=0"], r"rollout\.refresh: must be greater than 0"),
        (
            ["rollout.refresh=2", "rollout.from=teacher"],
            r"rollout\.refresh: must be 1 with rollout\.from=teacher, .* got 2",
        ),
        (["rollout.scored=[0.3, 0.3]"], r"rollout\.scored: must be two increasing .* \[0.3, 0.3\]"),
        (["rollout.scored=[0, 1.5]"], r"rollout\.scored\[1\]: must be at most 1"),
        (["rollout.from=nobody"], r"rollout\.from: must be 'student' or 'teacher'"),
        (["rollout.tokns=2"], r"rollout\.tokns: no such option \(did you mean 'tokens'"),
        (["data.columns={weight: worth}"], r"data\.columns\.weight: .* or `rollout`"),
    ],
)
def test_a_rollout_section_that_cannot_be_run_is_refused(tmp_path, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        limbeck.load(recipe(tmp_path), overrides)


def test_a_text_without_a_prompt_is_refused_and_some_are_counted(tmp_path):
    path = recipe(tmp_path, {"tokens": 4, "prompt_tokens": 60}, data={"sequence_length": 64})
    (tmp_path / "train.jsonl").write_text('{"text": "a still"}\n' * 3)
    with pytest.raises(DataError, match=r"3 are too short or have no prompt, and 0 have"):
        run(path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a still boils " * 40}) + "\n")
    with limbeck.assemble(limbeck.load(path)) as whole:
        told = "Documents that no rollout continues: 3 too short or without a prompt."
        assert whole.parts.notes[-2:] == ["Rollouts continue 1 prompts of 60 tokens.", told]


def test_a_routed_teacher_is_refused_before_the_student_loads(tmp_path, monkeypatch):
    path = recipe(tmp_path)
    monkeypatch.setattr("limbeck.experiment.parts.origin_of", None)
    online = f"{{type: online, path: {tmp_path / 'teacher'}}}"
    with pytest.raises(ConfigError, match=r"generated during the run needs one teacher"):
        run(path, f"teacher={{type: routed, teachers: {{train: {online}}}}}")


def test_a_student_with_other_end_tokens_is_refused(tmp_path):
    path = recipe(tmp_path)
    other = write_model(tmp_path / "other", rows=len(small()), layers=2)
    settings = json.loads((other / "generation_config.json").read_text()) | {"eos_token_id": 7}
    (other / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"the student's are \[7\] and the teacher's \[0\]"):
        run(path, f"student={{type: pretrained, path: {other}}}")
