"""Laws of teachers that are made of several."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

import limbeck
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.measure import measure
from limbeck.evaluate.scores import summarise
from limbeck.experiment import load
from limbeck.losses.distributions import log_softmax
from limbeck.teachers import (
    DISTRIBUTION,
    LocalTeacher,
    TeacherRequest,
    TextWindows,
    require_all_local,
    teachers,
)
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.routed import RoutedTeacher
from tests.data.data_files import write
from tests.experiment.recordings import recorded
from tests.experiment.tiny_run import steps_of, write_model, write_recipe, write_texts
from tests.models.tiny import random_batch, tiny_llama, tiny_tokenizer
from tests.tokenizers.small import small
from tests.train.toy import ALONE, FakeTeacher


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def member(seed):
    torch.manual_seed(seed)
    return LocalTeacher(tiny_llama(2, 32, seed=seed), tokenizer=tiny_tokenizer())


def logits_of(signal, num_positions):
    """Log-probabilities at all positions, whatever parts they come in."""
    parts = [
        (part.positions, log_softmax(part.distribution.logits(), 1.0)) for part in signal.parts
    ]
    whole = torch.full((num_positions, parts[0][1].shape[1]), torch.nan)
    for positions, values in parts:
        whole[slice(None) if positions is None else positions] = values
    return whole


def recipe_of_two(folder):
    """Two sources, train and held out, and a second teacher."""
    path = write_recipe(folder)
    write_model(folder / "other", rows=len(small()), seed=5)
    for kind, count, seed in (("train", 12, 3), ("held", 5, 7)):
        (folder / kind).mkdir()
        write_texts(folder / kind / "code.jsonl", count, seed=seed)
        write_texts(folder / kind / "chat.jsonl", count, seed=seed + 1)
    recipe = json.loads(path.read_text())
    online = [{"type": "online", "path": str(folder / each)} for each in ("teacher", "other")]
    recipe["teacher"] = {
        "type": "routed", "teachers": {"code": online[0], "chat": online[1]}
    }  # fmt: skip
    recipe["student"] = {"type": "pretrained", "path": str(folder / "other")}
    recipe["data"]["path"], recipe["evaluate"]["data"] = str(folder / "train"), str(folder / "held")
    recipe["evaluate"]["continuations"] = 0
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture
def parts(tmp_path):
    with limbeck.assemble(load(recipe_of_two(tmp_path))) as run:
        return run.parts


def everything(parts):
    held = parts.held_out.data
    return TeacherRequest(
        needs=DISTRIBUTION,
        vocabulary_size=parts.vocabulary.size,
        texts=(
            TextWindows("data", parts.data, range(len(parts.data.windows))),
            TextWindows("evaluate.data", held, range(len(held.windows))),
        ),
    )


def members_of(parts):
    return parts.teacher._members


def test_each_document_gets_its_own_teachers_distribution(parts):
    batch = parts.data.batch(range(parts.data.num_rows))
    signal = parts.teacher.signal(batch)
    assert len(signal.parts) == 2
    found = logits_of(signal, int(batch.num_scored()))
    names = [parts.data.document_name(int(d)) for d in batch.documents()]
    for source, teacher in members_of(parts).items():
        wanted = logits_of(teacher.signal(batch), int(batch.num_scored()))
        mine = torch.tensor([name.startswith(source) for name in names])
        assert 0 < mine.sum() < len(mine)
        torch.testing.assert_close(found[mine], wanted[mine], rtol=0, atol=1e-6)
        assert (found[~mine] - wanted[~mine]).abs().max() > 0.01


def test_routing_every_source_to_one_teacher_equals_that_teacher(parts):
    one = members_of(parts)["code"]
    routed = RoutedTeacher({"code": one, "chat": one.with_needs(DISTRIBUTION)})
    routed.require(everything(parts))
    batch = parts.data.batch(range(parts.data.num_rows))
    count = int(batch.num_scored())
    found, wanted = logits_of(routed.signal(batch), count), logits_of(one.signal(batch), count)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    held, student = parts.held_out.data, parts.student.model
    arguments = {"micro_batch": 3, "device": torch.device("cpu")}
    rows = range(held.num_rows)
    scores = [measure(student, each, held, rows, **arguments) for each in (routed, one)]
    found, wanted = map(summarise, scores)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], abs=1e-5), name


def as_one_file(folder, path):
    """The recipe with one file to train on and one held out; `domain` is each row's source."""
    recipe = json.loads(path.read_text())
    for kind, section, key in (("train", "data", "path"), ("held", "evaluate", "data")):
        rows = [
            json.loads(line) | {"domain": name}
            for name in ("chat", "code")  # in the order of the files
            for line in (folder / kind / f"{name}.jsonl").read_text().splitlines()
        ]
        write(folder / f"all-{kind}.jsonl", rows)
        recipe[section][key] = str(folder / f"all-{kind}.jsonl")
    recipe["data"]["columns"] = {"source": "domain"}
    recipe["output"] = str(folder / "run-of-column")
    path.write_text(json.dumps(recipe))
    return path


def test_routing_by_a_column_trains_and_reports_as_by_the_files(tmp_path):
    path = recipe_of_two(tmp_path)
    steps, figures = [], []
    for output in ("run", "run-of-column"):
        if output == "run-of-column":
            as_one_file(tmp_path, path)
        with limbeck.assemble(load(path)) as run:
            run.train()
        steps.append([each["loss"] for each in steps_of(tmp_path / output)])
        evaluation = json.loads((tmp_path / output / "evaluation.json").read_text())
        figures.append(evaluation["groups"]["distilled"]["source"])
    assert steps[0] == steps[1]
    by_file, by_column = figures
    assert [row["group"] for row in by_file] == ["chat.jsonl", "code.jsonl"]
    assert [row.pop("group") for row in by_column] == ["chat", "code"]
    for row in by_file:
        del row["group"]
    assert by_file == by_column


def test_source_without_a_teacher_is_refused_by_name_and_must_match_exactly(tmp_path):
    path = recipe_of_two(tmp_path)
    recipe = json.loads(path.read_text())
    first, second = recipe["teacher"]["teachers"].values()
    recipe["teacher"]["teachers"] = {"all-train": first, "chat": second}
    path.write_text(json.dumps(recipe))
    words = r"data: .*all-train\.jsonl:\d+ of source 'code' has none; .*after one source\."
    with (
        pytest.raises(DataError, match=words),
        limbeck.assemble(load(as_one_file(tmp_path, path))) as run,
    ):
        run.train()


def test_order_of_routed_teachers_does_not_matter(parts):
    turned = RoutedTeacher(dict(reversed(members_of(parts).items())))
    turned.require(everything(parts))
    batch = parts.data.batch(range(parts.data.num_rows))
    count = int(batch.num_scored())
    assert torch.equal(
        logits_of(turned.signal(batch), count), logits_of(parts.teacher.signal(batch), count)
    )


def test_empty_batch_gives_a_signal_without_positions(parts):
    signal = parts.teacher.signal(parts.data.batch([]))
    assert signal.distribution.logits().shape == (0, parts.vocabulary.size)


def test_a_compressed_file_has_the_teacher_of_its_name(tmp_path):
    path, code = recipe_of_two(tmp_path), tmp_path / "train" / "code.jsonl"
    code.with_suffix(".jsonl.gz").write_bytes(gzip.compress(code.read_bytes()))
    code.unlink()
    with limbeck.assemble(load(path)) as run:
        batch = run.parts.data.batch(range(run.parts.data.num_rows))
        assert len(run.parts.teacher.signal(batch).parts) == 2


def test_document_without_a_route_is_refused_by_name(parts):
    members = members_of(parts)
    routed = RoutedTeacher({"code": members["code"], "prose": members["chat"]})
    with pytest.raises(DataError, match=r"data: .*chat\.jsonl:1 has none.*code, prose"):
        routed.require(everything(parts))


def test_text_that_is_in_no_source_is_refused(parts):
    with pytest.raises(DataError, match="got another text"):
        parts.teacher.signal(random_batch(vocabulary=parts.vocabulary.size))


@pytest.mark.parametrize("kind", ["routed", "ensemble"])
def test_run_of_several_teachers_trains_and_evaluates(kind, tmp_path):
    path = recipe_of_two(tmp_path)
    if kind == "ensemble":
        recipe = json.loads(path.read_text())
        members = list(recipe["teacher"]["teachers"].values())
        recipe["teacher"] = {"type": "ensemble", "teachers": members, "weights": [1, 3]}
        path.write_text(json.dumps(recipe))
    with limbeck.assemble(load(path)) as run:
        run.train()
    assert len(steps_of(tmp_path / "run")) == 6
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert "forward_kl" in json.dumps(evaluation)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("inf")]])
def test_weights_that_are_not_one_positive_number_a_teacher_are_refused(weights):
    spec = {"type": "ensemble", "teachers": [{"type": "online", "path": "a"}] * 2}
    with pytest.raises(ConfigError, match="one positive number for each"):
        teachers.bind({**spec, "weights": weights}, "teacher")(ALONE)


def test_ensemble_of_one_equals_it():
    batch, one = random_batch(vocabulary=90), member(0)
    found = Ensemble([one], [3.0]).signal(batch).distribution
    torch.testing.assert_close(
        found.logits(), log_softmax(one.signal(batch).distribution.logits(), 1.0)
    )


def test_ensemble_is_the_mixture_of_probabilities_in_any_order():
    batch, first, second = random_batch(), member(0), member(1)
    p, q = (
        each.signal(batch).distribution.logits().double().softmax(-1) for each in (first, second)
    )
    wanted = (0.25 * p + 0.75 * q).log()
    found = Ensemble([first, second], [1.0, 3.0]).signal(batch).distribution
    turned = Ensemble([second, first], [3.0, 1.0]).signal(batch).distribution
    torch.testing.assert_close(found.logits().double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.logits(), found.logits(), rtol=0, atol=1e-6)
    student = torch.randn_like(found.logits())
    softened = torch.log_softmax(wanted / 2, -1)
    torch.testing.assert_close(
        found.compare(student, 2.0).teacher.double(), softened, rtol=0, atol=1e-5
    )
    entropy = -(wanted.exp() * wanted).sum(-1)
    torch.testing.assert_close(found.entropy().double(), entropy, rtol=0, atol=1e-5)
    split = type(found).cat([found.rows(slice(0, 2)), found.rows(slice(2, None))])
    assert torch.equal(split.logits(), found.logits())


def test_teachers_of_unlike_vocabularies_are_refused_by_name():
    other = LocalTeacher(tiny_llama(2, 32), tokenizer=small())
    with pytest.raises(ConfigError, match=r"one vocabulary, and .* do not"):
        Ensemble([member(0), other], [1.0, 1.0])


def test_hidden_states_of_several_teachers_are_refused():
    needs = replace(DISTRIBUTION, layers=frozenset({0}))
    with pytest.raises(ConfigError, match=r"nothing but distributions.*\[0\]"):
        Ensemble([member(0)], [1.0]).require(TeacherRequest(needs=needs))


def test_top_k_store_in_an_ensemble_is_refused_before_the_run(tmp_path):
    recorded(tmp_path, {"type": "top_k", "k": 4})
    both = [
        {"type": "stored", "path": str(tmp_path / "store")},
        {"type": "online", "path": str(tmp_path / "teacher")},
    ]
    several = teachers.bind({"type": "ensemble", "teachers": both}, "teacher")(ALONE)
    with pytest.raises(ConfigError, match=r"whole vocabulary, and the store .* holds top_k"):
        several.require(TeacherRequest(needs=DISTRIBUTION))


def test_a_plan_needs_the_weights_of_every_teacher():
    first, second = member(0), member(1)
    both = Ensemble([first, Ensemble([second], [1.0])], [1.0, 1.0])
    assert require_all_local(both, "a plan") == (first, second)
    with pytest.raises(ConfigError, match="a plan needs the weights of the teacher's model"):
        require_all_local(Ensemble([first, FakeTeacher(second)], [1.0, 1.0]), "a plan")
