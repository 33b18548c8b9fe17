"""Laws of a teacher with another tokenizer, and runs of it."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.batch import Batch
from limbeck.errors import ConfigError, DataError
from limbeck.evaluate.measure import measure
from limbeck.evaluate.scores import summarise
from limbeck.experiment import load
from limbeck.losses import SignalNeeds
from limbeck.losses.distributions import log_softmax
from limbeck.losses.head.likelihood import token_logprobs
from limbeck.losses.terms.alm import chunk_sums
from limbeck.teachers import DISTRIBUTION, LocalTeacher, TeacherRequest, teachers
from limbeck.teachers.cross_tokenizer import CrossTokenizerTeacher, spaced
from limbeck.teachers.ensemble import Ensemble
from limbeck.teachers.rereading import reread
from tests.experiment.tiny_run import steps_of, write_recipe
from tests.models.tiny import tiny_config, tiny_llama
from tests.tokenizers.assorted import tokenizers, wrap_plain
from tests.tokenizers.small import backend, small, wrap
from tests.tokenizers.test_alignment import begun
from tests.train.toy import ALONE


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def local(tokenizer, seed=0, layers=2):
    model = tiny_llama(layers, 32, vocabulary=len(tokenizer) + 5, seed=seed)
    return LocalTeacher(model, tokenizer=tokenizer)


def cross(teacher, student, **options):
    """A teacher with another tokenizer, bound to a student's."""
    bound = CrossTokenizerTeacher(teacher, ALONE, **options)
    bound.require(TeacherRequest(needs=DISTRIBUTION, student_tokenizer=student))
    return bound


def packed_batch(tokenizer, texts, rows=2):
    """Texts packed into rows of several segments, with unscored positions."""
    segments = [tokenizer(text)["input_ids"] for text in texts]
    per_row = [segments[i::rows] for i in range(rows)]
    width = max(sum(len(ids) - 1 for ids in row) for row in per_row)
    shape = (rows, width)
    inputs, targets, places = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    scored, documents = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for number, row in enumerate(per_row):
        at = 0
        for document, ids in enumerate(row):
            place = (number, slice(at, at + len(ids) - 1))
            inputs[place], targets[place] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
            scored[place], documents[place] = torch.rand(len(ids) - 1) < 0.8, document
            places[place] = torch.arange(len(ids) - 1)
            at += len(ids) - 1
        places[number, at:] = torch.arange(width - at)
    return Batch(inputs, targets, scored, places, documents)


TEXTS = (
    "A still boils the wash and catches what rises.",
    "In 1994 there were 12 of them.",
    "Grüße aus Köln, déjà vu, 日本語",
    "def distil(teacher, student): return student",
    "The spirit of a large thing fits into a small one.",
)


def test_equal_tokenizers_give_the_teachers_own_distribution_everywhere():
    tokenizer = small()
    batch, plain = packed_batch(tokenizer, TEXTS), local(tokenizer)
    plain.require(TeacherRequest(needs=DISTRIBUTION, vocabulary_size=len(tokenizer)))
    wanted = log_softmax(plain.signal(batch).distribution.logits(), 1.0)
    (part,) = cross(plain, tokenizer).signal(batch).parts
    assert part.positions.tolist() == list(range(int(batch.num_scored())))
    of = part.distribution.outcomes.student
    torch.testing.assert_close(part.distribution.at(1.0)[:, of], wanted, rtol=0, atol=1e-5)


def test_a_permuted_vocabulary_gives_the_same_distribution():
    """A teacher whose ids are renamed, in its tokenizer and in its weights."""
    tokenizer = small()
    order = torch.randperm(320)
    tree = json.loads(backend().to_str())
    new_id = {int(old): new for new, old in enumerate(order)}
    tree["model"]["vocab"] = {t: new_id[i] for t, i in tree["model"]["vocab"].items()}
    for token in tree["added_tokens"]:
        token["id"] = new_id[token["id"]]
    tree["added_tokens"].sort(key=lambda token: token["id"])
    renamed = wrap(type(backend()).from_str(json.dumps(tree)))
    plain, other = local(tokenizer), local(renamed)
    weights = plain.model.hf_model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name][:320][order], weights[name][320:]])
    other.model.hf_model.load_state_dict(weights)
    batch = packed_batch(tokenizer, TEXTS)
    (first,), (second,) = (cross(each, tokenizer).signal(batch).parts for each in (plain, other))
    assert torch.equal(first.positions, second.positions)
    own, renamed_own = (
        part.distribution.at(1.0)[:, part.distribution.outcomes.student] for part in (first, second)
    )
    torch.testing.assert_close(renamed_own, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [("bpe", "small bpe"), ("unigram", "digits")])
def test_each_position_has_the_distribution_after_the_same_bytes(student, teacher):
    """The slow way: the teacher reads the bytes of each position alone."""
    ours, theirs = tokenizers()[student], tokenizers()[teacher]
    bound, batch = cross(local(theirs), ours), packed_batch(ours, TEXTS)
    (part,) = bound.signal(batch).parts
    aligner = bound._known.aligner
    rows, columns = batch.scored.nonzero()[part.positions].t().tolist()
    assert len(rows) > 0.4 * int(batch.num_scored())
    compared = 0
    for n in range(0, len(rows), 7):
        raw, tokens = read_at(bound, batch, rows[n], columns[n])
        assert b"".join(aligner.teacher.bytes_of[i] for i in tokens).removeprefix(b" ") == raw
        logits = bound._teacher.model.logits(torch.tensor([tokens]))[0, -1:]
        own = part.distribution.member.rows(slice(n, n + 1)).logits()
        torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)
        compared += 1
    assert compared > 8


def read_at(bound, batch, row, column):
    """The bytes a student has read at a position, and the teacher tokens of the segment so far."""
    places, aligner = batch.position_ids[row], bound._known.aligner
    start = column - int(places[column])
    later = (places[column + 1 :] == 0).nonzero()
    end = column + 1 + int(later[0]) if len(later) else len(places)
    ids = [*batch.input_ids[row, start:end].tolist(), int(batch.target_ids[row, end - 1])]
    raw = b"".join(aligner.student.bytes_of[i] for i in ids[: column + 1 - start])
    (whole,) = aligner.align([ids])
    last = whole.teacher_edges.tolist().index(len(raw))
    return raw.removeprefix(b" "), whole.teacher_ids[: last + 1].tolist()


def test_packing_and_micro_batches_do_not_change_a_signal():
    ours = tokenizers()["bpe"]
    bound, batch = cross(local(tokenizers()["unigram"]), ours), packed_batch(ours, TEXTS)
    (whole,) = bound.signal(batch).parts
    split = [bound.signal(batch.part(slice(i, i + 1))).parts[0] for i in range(len(batch))]
    offset = int(batch.part(slice(0, 1)).num_scored())
    positions = torch.cat([split[0].positions, split[1].positions + offset])
    assert torch.equal(positions, whole.positions)
    again = torch.cat([part.distribution.at(1.0) for part in split])
    torch.testing.assert_close(again, whole.distribution.at(1.0), rtol=0, atol=1e-5)


def test_a_batch_without_scored_positions_gives_an_empty_part():
    ours = tokenizers()["bpe"]
    bound = cross(local(tokenizers()["unigram"]), ours)
    batch = packed_batch(ours, TEXTS)
    nothing = replace(batch, scored=torch.zeros_like(batch.scored))
    (part,) = bound.signal(nothing).parts
    assert len(part.positions) == 0
    assert part.distribution.at(1.0).shape == (0, bound._known.outcomes.num_outcomes)


def test_the_teacher_begins_every_text_with_its_own_token():
    theirs = wrap_plain(begun(backend(300)))
    bound = cross(local(theirs), small())
    reading = reread(packed_batch(small(), TEXTS), bound._known.aligner)
    begins = reading.batch.input_ids[reading.batch.position_ids == 0]
    real = reading.batch.document_ids[reading.batch.position_ids == 0] >= 0
    assert (begins[real] == theirs("a")["input_ids"][0]).all()


# Runs.


def write_pair(folder, **changes):
    """The tiny run's recipe with a teacher of another tokenizer, and a student on disk."""
    path = write_recipe(folder, **changes)
    recipe = json.loads(path.read_text())
    theirs = tokenizers()["unigram"]
    config = tiny_config("llama", 3, vocabulary=len(theirs) + 3, tie_word_embeddings=False)
    config.eos_token_id = theirs.eos_token_id
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "other")
    theirs.save_pretrained(folder / "other")
    inner = {"type": "online", "path": str(folder / "other")}
    recipe["student"] = {"type": "pretrained", "path": str(folder / "teacher")}
    recipe["teacher"] = {"type": "cross_tokenizer", "teacher": inner}
    path.write_text(json.dumps(recipe))
    return path


def test_a_run_trains_resumes_and_measures(tmp_path):
    changes = {"checkpoint": {"every": 1}, "evaluate": {"every": 2}}
    path = write_pair(tmp_path, optim={"steps": 2, "warmup_steps": 0}, **changes)
    with limbeck.assemble(load(path)) as run:
        run.train()
    steps = steps_of(tmp_path / "run")
    assert [r["step"] for r in steps] == [1, 2]
    assert all(r["divergence"] > 0 for r in steps)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {"forward_kl", "bits_per_byte"} <= evaluation["trials"]["distilled"].keys()
    notes = json.loads((tmp_path / "run" / "provenance.json").read_text())["vocabulary"]["notes"]
    assert sum(note.startswith("Coverage of the ") for note in notes) == 2
    assert "Coverage of the student" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "scores.json").unlink()
    with limbeck.assemble(load(tmp_path / "run" / "recipe.yaml")) as run:
        run.train(resume=True)
        assert [r["step"] for r in steps_of(tmp_path / "run")] == [1, 2]
        assert run.evaluate(tmp_path / "run" / "student")["trials"]["distilled"]


def test_positions_without_a_teacher_count_zero_in_a_mean(tmp_path):
    with limbeck.assemble(load(write_pair(tmp_path))) as run:
        parts = run.parts
        held, rows = parts.held_out.data, range(parts.held_out.data.num_rows)
        student = parts.student.model
        arguments = {"micro_batch": 3, "device": torch.device("cpu")}
        scores = measure(student, parts.teacher, held, rows, **arguments)
        batch = held.batch(rows)
        (part,) = parts.teacher.signal(batch).parts
        hidden, _ = student(batch)
        logits = student.head(hidden)
        pair = part.distribution.compare(logits[part.positions], 1.0)
    total = float((pair.teacher.exp() * (pair.teacher - pair.student)).sum().detach())
    assert 0 < len(part.positions) < len(logits)
    assert scores.mean("forward_kl") == pytest.approx(total / len(logits), rel=1e-4)
    wanted = torch.nn.functional.cross_entropy(logits, batch.targets())
    assert scores.mean("cross_entropy") == pytest.approx(wanted.item(), rel=1e-4)
    assert "bits_per_byte" in summarise(scores)
    assert "top1_agreement" not in scores.metrics


@pytest.mark.parametrize(("alpha", "is_told"), [(0.3, False), (0.9, True)])
def test_a_large_alpha_is_warned_of(tmp_path, alpha, is_told):
    with limbeck.assemble(load(write_pair(tmp_path), [f"objective.alpha={alpha}"])) as run:
        assert any("try 0.3" in note for note in run.parts.notes) == is_told


def test_the_run_starts_from_the_students_own_ids(tmp_path):
    with limbeck.assemble(load(write_pair(tmp_path))) as run:
        assert run.parts.tokenizer.get_vocab() == small().get_vocab()
        assert run.parts.vocabulary.size == len(small())
        assert run.parts.facts["teacher"]["name"] == str(tmp_path / "other")


def test_a_different_tokenizer_is_refused_and_cross_tokenizer_is_suggested(tmp_path):
    path = write_pair(tmp_path)
    recipe = json.loads(path.read_text())
    recipe["teacher"] = recipe["teacher"]["teacher"]
    path.write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match=r"set `teacher: \{type: cross_tokenizer"):
        limbeck.assemble(load(path))


# Refusals.


def test_texts_that_cannot_be_aligned_are_listed_or_left_without_a_teacher(tmp_path):
    path = write_pair(tmp_path)
    tree = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "NFC"}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tree))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "cafe\u0301 the wash and the spirit"}) + "\n")
    listed = r"1 of 226 windows are not:\n  data: train\.jsonl:41: the teacher's .*\(NFC\)"
    with pytest.raises(DataError, match=listed):
        limbeck.assemble(load(path))
    with limbeck.assemble(load(path, ["teacher.unaligned=skip"])) as run:
        assert any("1 of 226" in note and "text alone" in note for note in run.parts.notes)
        data = run.parts.data
        batch = data.batch(range(data.num_rows))
        (part,) = run.parts.teacher.signal(batch).parts
        is_last = batch.documents() == data.num_documents - 1
        assert is_last.any()
        assert not is_last[part.positions].any()


def test_windows_that_are_checked_are_spread_over_a_long_text():
    assert spaced(range(10, 20), 20) == list(range(10, 20))
    assert spaced(range(10, 21), 3) == [10, 15, 20]


def test_a_text_of_which_nothing_can_be_aligned_is_refused_whatever_is_set(tmp_path):
    path = write_pair(tmp_path)
    tree = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "Prepend", "prepend": "x"}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="Every text must be bytes that both"):
        limbeck.assemble(load(path, ["teacher.unaligned=skip"]))


def test_an_uncovered_class_is_refused_unless_the_recipe_says_so(tmp_path, monkeypatch):
    path = write_pair(tmp_path)
    monkeypatch.setattr("limbeck.tokenizers.coverage.MIN_COVERED", 1.01)
    with pytest.raises(ConfigError, match=r"does not in words of the student \(.*uncovered: skip"):
        limbeck.assemble(load(path))
    with limbeck.assemble(load(path, ["teacher.uncovered=skip"])) as run:
        assert run.parts.notes


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TeacherRequest(generated=True), "Remove `rollout`"),
        (TeacherRequest(needs=SignalNeeds(layers=frozenset({1}))), r"teacher's layers \[1\]"),
    ],
)
def test_what_it_cannot_provide_is_refused_before_the_run(request_, message):
    with pytest.raises(ConfigError, match=message):
        CrossTokenizerTeacher(local(tokenizers()["bpe"]), ALONE).require(request_)


def test_a_term_that_reads_whole_logits_is_refused_before_the_run(tmp_path):
    path = write_pair(tmp_path)
    extra = "objective.extra=[{type: decoupled, weight: 0.1}]"
    with pytest.raises(ConfigError, match=r"'decoupled' reads .* held as MergedOutcomes"):
        limbeck.assemble(load(path, [extra]))


def test_a_teacher_without_weights_here_is_refused(tmp_path):
    write_recipe(tmp_path)
    inner = {"type": "ensemble", "teachers": [{"type": "online", "path": f"{tmp_path}/teacher"}]}
    with pytest.raises(ConfigError, match=r"teacher\.teacher: .* needs the weights"):
        teachers.bind({"type": "cross_tokenizer", "teacher": inner}, "teacher")(ALONE)


def test_several_teachers_of_which_one_has_another_tokenizer_are_refused():
    unlike = CrossTokenizerTeacher(local(tokenizers()["bpe"]), ALONE)
    with pytest.raises(ConfigError, match="cross_tokenizer do not: 1"):
        Ensemble([local(small()), unlike], [1.0, 1.0])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    tokenizer = tokenizers()["bpe"]
    few = LocalTeacher(tiny_llama(1, 32, vocabulary=400), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="a row for each of the 900 token ids"):
        cross(few, small())


# Likelihoods of chunks.

BOTH = SignalNeeds(distribution=True, likelihoods=True)


def likelihood_pair(student, teacher, seed=0):
    """A teacher that gives likelihoods, and its model."""
    plain = local(teacher, seed=seed)
    bound = CrossTokenizerTeacher(plain, ALONE)
    bound.require(TeacherRequest(needs=BOTH, student_tokenizer=student))
    return bound, plain.model


def log_likelihood(model, ids):
    """Log-likelihood of all tokens but the first."""
    logp = model.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return float(logp.gather(-1, torch.tensor(ids[1:])[:, None]).sum().detach())


def test_chunk_likelihoods_multiply_to_the_texts_on_both_sides():
    ours, theirs = wrap_plain(begun(backend(320))), wrap_plain(begun(backend(290)))
    bound, model = likelihood_pair(ours, theirs)
    student = tiny_llama(2, 32, vocabulary=len(ours), seed=3)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        batch = Batch.from_tokens(torch.tensor([ids]))
        chunk_of, logprobs = bound.signal(batch).likelihoods
        assert len(logprobs) < len(theirs(text)["input_ids"]) - 1
        assert set(chunk_of.tolist()) == set(range(len(logprobs)))
        assert float(logprobs.sum()) == pytest.approx(
            log_likelihood(model, theirs(text)["input_ids"]), rel=1e-5
        )
        hidden, _ = student(batch)
        own = token_logprobs(hidden.detach(), student.head.detach(), batch.targets())
        sums = chunk_sums(own, chunk_of, len(logprobs))
        assert float(sums.sum()) == pytest.approx(log_likelihood(student, ids), rel=1e-5)


def test_equal_tokenizers_have_a_chunk_for_each_token_with_its_likelihood():
    tokenizer = small()
    bound, model = likelihood_pair(tokenizer, tokenizer)
    batch = packed_batch(tokenizer, TEXTS)
    signal = bound.signal(batch)
    chunk_of, logprobs = signal.likelihoods
    assert chunk_of.tolist() == list(range(int(batch.num_scored())))
    hidden, _ = model(batch)
    torch.testing.assert_close(logprobs, token_logprobs(hidden, model.head, batch.targets()))
    (part,) = signal.parts
    (alone,) = cross(local(tokenizer), tokenizer).signal(batch).parts
    assert torch.equal(part.positions, alone.positions)
    torch.testing.assert_close(part.distribution.at(1.0), alone.distribution.at(1.0))


@pytest.mark.parametrize(("student", "teacher"), [("bpe", "unigram"), ("unigram", "small bpe")])
def test_without_a_beginning_token_the_first_chunk_is_left_out(student, teacher):
    ours, theirs = tokenizers()[student], tokenizers()[teacher]
    bound, model = likelihood_pair(ours, theirs)
    ids = ours(TEXTS[0])["input_ids"]
    batch = Batch.from_tokens(torch.tensor([ids]))
    chunk_of, logprobs = bound.signal(batch).likelihoods
    (aligned,) = bound._known.aligner.align([ids])
    chunks = aligned.chunks(torch.tensor([False, *[True] * (len(ids) - 1)]).numpy())
    assert chunks.teacher[0] == chunks.student[0] == -1
    kept = torch.from_numpy(chunks.teacher) >= 0
    teacher_ids = torch.from_numpy(aligned.teacher_ids)
    logp = model.logits(teacher_ids[None, :-1])[0].log_softmax(-1)
    each = logp.gather(-1, teacher_ids[1:, None])[:, 0].detach()
    assert float(logprobs.sum()) == pytest.approx(float(each[kept[1:]].sum()), rel=1e-5)
    assert (chunk_of < len(logprobs)).sum() == int((chunks.student >= 0).sum())


def test_a_chunk_with_an_unscored_token_is_left_out():
    ours = tokenizers()["bpe"]
    bound, _ = likelihood_pair(ours, tokenizers()["unigram"])
    batch = packed_batch(ours, TEXTS)
    _, logprobs = bound.signal(batch).likelihoods
    whole = replace(batch, scored=batch.document_ids >= 0)
    all_of, all_logprobs = bound.signal(whole).likelihoods
    scored = batch.scored[whole.scored]
    kept = [c for c in range(len(all_logprobs)) if bool(scored[all_of == c].all())]
    assert 0 < len(kept) < len(all_logprobs)
    torch.testing.assert_close(logprobs, all_logprobs[kept], rtol=0, atol=1e-4)


def test_a_run_with_alm_trains_with_and_without_a_divergence(tmp_path):
    path = write_pair(tmp_path, optim={"steps": 1, "warmup_steps": 0})
    options = ["objective.extra=[{type: alm, weight: 0.5}]", "evaluate.data=null"]
    for alpha, name, shard in ((0.5, "a", "always"), (0.0, "b", "auto")):
        own = [f"objective.alpha={alpha}", f"output={tmp_path}/{name}", f"parallel.shard={shard}"]
        with limbeck.assemble(load(path, [*options, *own])) as run:
            run.train()
        (step,) = steps_of(tmp_path / name)
        assert step["alm"] > 0
        assert ("divergence" in step) == (alpha > 0)


def test_alm_is_refused_for_a_teacher_without_likelihoods(tmp_path):
    options = [
        "objective.extra=[{type: alm, weight: 0.5}]",
        f"student.path={tmp_path / 'teacher'}",
    ]
    several = (
        f"teacher={{type: ensemble, teachers: [{{type: online, path: {tmp_path / 'teacher'}}}]}}"
    )
    with pytest.raises(ConfigError, match="need the teacher's likelihood of the text, which this"):
        limbeck.assemble(load(write_recipe(tmp_path), [*options, several]))


def test_alm_of_a_local_teacher_is_that_of_the_same_teacher_aligned(tmp_path):
    """With equal tokenizers every token is a chunk of its own."""
    path, losses = write_recipe(tmp_path, optim={"steps": 2}, evaluate={"data": None}), []
    options = ["objective={alpha: 0.0, extra: [{type: alm, weight: 0.5}]}"]
    options.append(f"student.path={tmp_path / 'teacher'}")
    for name in ("online", "cross_tokenizer"):
        own = [*options, f"output={tmp_path / name}"]
        if name == "cross_tokenizer":
            inner = f"{{type: online, path: {tmp_path / 'teacher'}}}"
            own.append(f"teacher={{type: cross_tokenizer, teacher: {inner}}}")
        with limbeck.assemble(load(path, own)) as run:
            run.train()
        losses.append([step["alm"] for step in steps_of(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
