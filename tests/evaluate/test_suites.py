"""Suites of evaluation over a tiny teacher, its student and a text on disk."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.evaluate.generation import SAMPLED_AT_ONCE, Generation, distinct, own_sums
from limbeck.evaluate.paired import compared_items, mcnemar, quality_retained, versus
from limbeck.evaluate.speculative import Speculative
from limbeck.evaluate.suites import SuiteContext, suites
from limbeck.evaluate.tasks import CHOICES, Tasks, choice_items
from limbeck.experiment import assemble, load
from limbeck.experiment.trials import suite_context
from limbeck.models import CausalLM
from limbeck.rollouts import write_assisted
from limbeck.teachers import find_local
from tests.experiment.tiny_run import write_recipe, write_texts

SHORT = {"prompts": 5, "tokens": 6, "prompt_tokens": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SuiteContext, CausalLM]]:
    """What suites measure with, and a student of two of the teacher's four layers."""
    folder = tmp_path_factory.mktemp("suites")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder / "cache"))
        path = write_recipe(folder, data={"sequence_length": 64})
        write_texts(folder / "held.jsonl", 24, seed=2)
        with assemble(load(path)) as run:
            context = suite_context(run.parts)
            assert context is not None
            assert run.parts.student is not None
            yield context, run.parts.student.model


def generation(context: SuiteContext, **changes: float) -> Generation:
    """The suite with few and short prompts."""
    suite = suites.bind({"type": "generation", **SHORT, **changes}, "suite")(context)
    assert isinstance(suite, Generation)
    return suite


def test_a_teacher_that_is_its_own_student_writes_the_same_texts(
    made: tuple[SuiteContext, CausalLM],
) -> None:
    context, _ = made
    suite = generation(context)
    found = suite.measure(suite._teacher.model)
    assert found["prompts"] == 5
    for name, figure in found["difference"].items():
        assert figure == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-5), name
    student = found["student"]
    assert student["forward_kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert student["teacher_nll"] == pytest.approx(student["own_nll"], abs=1e-5)
    assert [student[f"distinct_{n}"] for n in (1, 2, 3)] == [
        found["teacher"][f"distinct_{n}"] for n in (1, 2, 3)
    ]


def test_figures_of_samples_are_those_of_a_loop_over_their_tokens(
    made: tuple[SuiteContext, CausalLM],
) -> None:
    context, student = made
    suite = generation(context)
    found = suite.measure(student)["student"]
    nll, own, tokens = [], [], []
    for rollout in suite._write(student):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
        with torch.no_grad():
            models = (suite._teacher.model, student)
            p, q = (model.logits(ids).double().log_softmax(-1)[0] for model in models)
        at = range(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
        nll += [-float(p[t, ids[0, t + 1]]) for t in at]
        own += [-float(q[t, ids[0, t + 1]]) for t in at]
        tokens.append(list(rollout.token_ids))
    assert found["teacher_nll"]["value"] == pytest.approx(np.mean(nll), abs=1e-5)
    assert found["own_nll"]["value"] == pytest.approx(np.mean(own), abs=1e-5)
    assert found["teacher_nll"]["low"] < found["teacher_nll"]["value"]
    assert found["length"]["value"] == np.mean([len(text) for text in tokens])
    assert found["distinct_1"] == len({i for text in tokens for i in text}) / sum(map(len, tokens))


def test_two_ranks_write_the_texts_of_one(made: tuple[SuiteContext, CausalLM]) -> None:
    context, student = made
    whole = [r.token_ids for r in generation(context)._write(student)]
    for rank in (0, 1):
        world = dataclasses.replace(context.world, rank=rank, size=2)
        suite = generation(dataclasses.replace(context, world=world))
        assert [r.token_ids for r in suite._write(student)] == whole[rank::2]
    other = [r.token_ids for r in generation(context, seed=1)._write(student)]
    assert other != whole


def test_prompts_are_of_test_documents_only(made: tuple[SuiteContext, CausalLM]) -> None:
    context, _ = made
    held_out = context.held_out
    suite = generation(context, prompts=1000)
    documents = held_out.data.row_documents[held_out.test_rows]
    ends = held_out.data.document_ends
    begins = [int(ends[d - 1]) if d else 0 for d in sorted(set(documents.tolist()))]
    wanted = [held_out.data.tokens[begin : begin + 4].tolist() for begin in begins]
    assert len(wanted) > SAMPLED_AT_ONCE
    assert suite._prompts == wanted


def test_repetition_and_variety_are_counted_by_hand() -> None:
    texts = [[1, 2, 1, 2, 1, 2], [3]]
    rows = [{"token_ids": t, "finish": "end", "logprobs": [-1.0] * len(t)} for t in texts]
    sums = own_sums(rows)
    assert sums["ngrams"].tolist() == pytest.approx([3, 0], abs=1e-6)
    assert sums["repeated"].tolist() == pytest.approx([1, 0], abs=1e-6)  # 1212, 2121, 1212
    assert sums["own_nll"].tolist() == [6, 1]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 2 / 5
    assert distinct([[1]], 3) == 0


def test_prompts_that_no_document_has_are_refused(made: tuple[SuiteContext, CausalLM]) -> None:
    with pytest.raises(ConfigError, match="longer than its prompt"):
        generation(made[0], prompt_tokens=100)


def test_mcnemars_p_is_that_of_a_fair_coin() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(9, 2) == mcnemar(2, 9) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert 0 < mcnemar(4000, 4400) < 2e-5


def test_quality_retained_is_0_at_chance_and_1_at_the_teacher() -> None:
    teacher, floor = np.array([1.0] * 30 + [0.0] * 10), np.full(40, 0.25)
    assert quality_retained(teacher, teacher, floor) == {"value": 1.0, "low": 1.0, "high": 1.0}
    none = quality_retained(floor, teacher, floor)
    assert none is not None
    assert none["value"] == 0.0
    half = np.array([1.0] * 20 + [0.0] * 20)
    found = quality_retained(half, teacher, floor)
    assert found is not None
    assert found["value"] == pytest.approx((0.5 - 0.25) / (0.75 - 0.25))
    assert found["low"] < found["value"] < found["high"]


def test_quality_retained_is_left_out_for_a_teacher_at_chance() -> None:
    floor = np.full(40, 0.25)
    guessing = np.array([1.0] * 10 + [0.0] * 30)
    assert quality_retained(guessing, guessing, floor) is None


def test_models_are_compared_on_the_same_items() -> None:
    teacher = np.array([1.0, 1.0, 1.0, 0.0] * 10)
    student = np.array([1.0, 0.0, 1.0, 0.0] * 10)
    found = compared_items({"distilled": student, "teacher": teacher}, np.zeros(40))
    assert found["models"]["distilled"]["value"] == 0.5
    assert found["against"]["teacher"]["difference"]["value"] == -0.25
    assert found["against"]["teacher"]["only_other"] == 10
    assert found["against"]["teacher"]["p"] == pytest.approx(2 / 2**10)
    assert "p" not in versus(student / 2, teacher)


def test_each_item_offers_its_own_continuation_and_three_of_other_texts(
    made: tuple[SuiteContext, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, _ = made
    monkeypatch.setattr("limbeck.evaluate.tasks.CONTEXT_TOKENS", 5)
    monkeypatch.setattr("limbeck.evaluate.tasks.CHOICE_TOKENS", 4)
    items = list(choice_items(context, seed=0))
    data = context.held_out.data
    texts = np.split(np.asarray(data.tokens), np.asarray(data.document_ends)[:-1])
    starts = [context.tokenizer.decode(text[:9].tolist()) for text in texts]
    assert len(items) > 10
    for item in items:
        assert len(set(item["choices"])) == CHOICES
        rights = [item["question"] + choice in starts for choice in item["choices"]]
        assert rights == [place == item["answer"] for place in range(CHOICES)]
    assert items == list(choice_items(context, seed=0))
    assert {item["answer"] for item in items} == set(range(CHOICES))


def test_without_the_harness_tasks_are_refused_with_the_command_that_installs_it(
    made: tuple[SuiteContext, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in sys.modules if name.split(".")[0] == "lm_eval"]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"pip install 'limbeck\[eval\]'"):
        suites.bind({"type": "tasks", "tasks": ["mine"]}, "suite")(made[0])


OWN_TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_task(folder: Path) -> Path:
    """A folder with a task of thirty questions with three choices."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    words = ["still", "boils", "wash", "catches", "rises", "spirit", "large", "small"]
    with (folder / "items.jsonl").open("w") as file:
        for _ in range(30):
            chosen = generator.permutation(words)[:4].tolist()
            answer = int(generator.integers(3))
            file.write(
                f'{{"question": "the {chosen[0]}", "choices": ["{chosen[1]}", "{chosen[2]}", '
                f'"{chosen[3]}"], "answer": {answer}}}\n'
            )
    text = OWN_TASK.format(file=folder / "items.jsonl", cache=folder / "cache")
    (folder / "which_word.yaml").write_text(text)
    return folder


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_figures_of_tasks_are_those_of_the_harness_called_directly(
    made: tuple[SuiteContext, CausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    context, student = made
    monkeypatch.setattr("limbeck.evaluate.tasks.CONTEXT_TOKENS", 5)
    monkeypatch.setattr("limbeck.evaluate.tasks.CHOICE_TOKENS", 4)
    include = write_task(tmp_path / "tasks")
    options = {"tasks": ["which_word", "held_out_choice"], "include": str(include), "limit": 20}
    suite = suites.bind({"type": "tasks", **options}, "suite")(context)
    assert isinstance(suite, Tasks)
    found = suite.measure_all({"distilled": student})
    teacher = suite._teacher.model
    rows = {(row["task"], row["metric"]): row for row in found["rows"]}
    assert set(rows) == {
        (task, metric) for task in options["tasks"] for metric in ("acc", "acc_norm")
    }
    manager = TaskManager(include_path=str(include), include_defaults=False)
    for name, model in {"distilled": student, "teacher": teacher}.items():
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model.hf_model, tokenizer=context.tokenizer, batch_size=4),
            tasks=["which_word"],
            task_manager=manager,
            limit=20,
            bootstrap_iters=0,
        )["results"]["which_word"]
        for metric in ("acc", "acc_norm"):
            row = rows["which_word", metric]
            assert row["items"] == 20
            assert row["floor"] == pytest.approx(1 / 3)
            assert row["models"][name]["value"] == pytest.approx(results[f"{metric},none"])
    assert rows["held_out_choice", "acc"]["floor"] == pytest.approx(1 / 4)
    assert math.isfinite(rows["held_out_choice", "acc"]["against"]["teacher"]["p"])
    mine = own_accuracy(suite, student, context)
    assert rows["held_out_choice", "acc"]["models"]["distilled"]["value"] == pytest.approx(mine)


def own_accuracy(suite: Tasks, model: CausalLM, context: SuiteContext) -> float:
    """Share of the first twenty items whose own ending has the largest log-likelihood."""
    right = []
    for item in suite._items[:20]:
        begin = len(context.tokenizer(item["question"]).input_ids)
        scores = []
        for choice in item["choices"]:
            ids = torch.tensor([context.tokenizer(item["question"] + choice).input_ids])
            with torch.no_grad():
                logprobs = model.logits(ids).double().log_softmax(-1)[0]
            scores.append(
                sum(float(logprobs[t - 1, ids[0, t]]) for t in range(begin, ids.shape[1]))
            )
        right.append(int(np.argmax(scores)) == item["answer"])
    return float(np.mean(right))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_named_with_its_nearest(
    made: tuple[SuiteContext, CausalLM], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    include = write_task(tmp_path / "tasks")
    spec = {"type": "tasks", "tasks": ["which_wrd"], "include": str(include)}
    with pytest.raises(ConfigError, match="did you mean 'which_word'"):
        suites.bind(spec, "suite")(made[0])
    spec = {"type": "tasks", "tasks": ["which_word"], "include": str(include)}
    (include / "items.jsonl").unlink()
    with pytest.raises(ConfigError, match="could not load the task 'which_word'"):
        suites.bind(spec, "suite")(made[0])


def test_a_teacher_that_drafts_for_itself_has_every_draft_accepted(
    made: tuple[SuiteContext, CausalLM],
) -> None:
    context, student = made
    options = {"type": "speculative", **SHORT, "tokens": 12, "draft_tokens": 3}
    suite = suites.bind(options, "suite")(context)
    assert isinstance(suite, Speculative)
    same = suite.measure(deepcopy(suite._teacher.model))
    assert same["acceptance"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert same["shared"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert same["tokens_per_pass"]["value"] > 2
    other = suite.measure(student)
    assert 0 < other["acceptance"]["value"] < 1
    assert other["tokens_per_pass"]["value"] < same["tokens_per_pass"]["value"]


def test_as_many_drafts_are_accepted_as_the_models_share_probability(
    made: tuple[SuiteContext, CausalLM],
) -> None:
    """Every pass keeps its accepted drafts and one token more."""
    context, student = made
    teacher = find_local(context.teacher)
    assert teacher is not None
    texts = [
        write_assisted(teacher.model, student, [5, 6, 7], tokens=16, draft_tokens=2, seed=seed)
        for seed in range(20)
    ]
    tested, accepted = (sum(getattr(t, name) for t in texts) for name in ("tested", "accepted"))
    written = sum(len(t.token_ids) for t in texts)
    assert written == accepted + sum(t.passes for t in texts)
    expected = sum(t.shared for t in texts) / written
    error = math.sqrt(expected * (1 - expected) / tested)
    assert abs(accepted / tested - expected) < 4 * error
