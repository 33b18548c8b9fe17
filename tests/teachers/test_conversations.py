"""Conversations that student and teacher write with chat templates of their own."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.data.formats.chat import end_of_answer
from limbeck.errors import ConfigError, DataError
from limbeck.experiment import load
from limbeck.losses.distributions import log_softmax
from limbeck.teachers import TeacherRequest
from limbeck.teachers.cross_tokenizer import make_pair
from limbeck.teachers.local import LocalTeacher
from limbeck.tokenizers import (
    Aligner,
    Coverage,
    Rendering,
    TokenBytes,
    add_coverage,
    align_conversation,
    classes_of,
    part_of,
    shared_outcomes,
)
from tests.experiment.tiny_run import steps_of, write_recipe
from tests.models.tiny import tiny_config, tiny_llama
from tests.tokenizers.assorted import byte_bpe, unigram, wrap_plain
from tests.tokenizers.small import CHATML, small

HEADED = (
    "{% for m in messages %}[{{ m.role }}]:\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]:\n{% endif %}"
)
"""A template that puts its end token after answers only."""
SPACED = (
    "{% for m in messages %}[{{ m.role }}]:{% if m.role == 'assistant' %}{% generation %}"
    " {{ m.content }}{{ eos_token }}{% endgeneration %}{% else %} {{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]:{% endif %}"
)
"""A template that puts a space before answers, as part of them."""
STOP = "</s>"
ANSWERS = (
    ("A still boils the wash.", "In 1994 there were 12 of them; déjà vu, 日本語."),
    ("def distil(teacher, student):\n    return student", "It rises."),
    ("The spirit of a large thing fits into a small one.", "Yes."),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def teacher_tokenizer(backend=None, template=HEADED):
    """A tokenizer with another end token and another template."""
    tokenizer = wrap_plain(backend or byte_bpe(500, digits=True, end=STOP), end=STOP)
    tokenizer.chat_template = template
    return tokenizer


def chat(number, first, second):
    asked = [f"Question {number}?", "And then?"]
    turns = zip(asked, (first, second), strict=True)
    return [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]


def conversations():
    return [chat(number, *ANSWERS[number % 3]) for number in range(12)]


def write_pair(folder, theirs, chats=None, **changes):
    """A recipe of conversations, a student with ChatML, a teacher with another template."""
    path = write_recipe(folder, **changes)
    recipe = json.loads(path.read_text())
    config = tiny_config("llama", 3, vocabulary=len(theirs) + 3, tie_word_embeddings=False)
    config.eos_token_id = theirs.eos_token_id
    config.max_position_embeddings = 256
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "other")
    theirs.save_pretrained(folder / "other")
    small(template=CHATML).save_pretrained(folder / "teacher")
    student = json.loads((folder / "teacher" / "config.json").read_text())
    student["max_position_embeddings"] = 256
    (folder / "teacher" / "config.json").write_text(json.dumps(student))
    lines = [json.dumps({"messages": each}) + "\n" for each in chats or conversations()]
    (folder / "chat.jsonl").write_text("".join(lines))
    recipe["student"] = {"type": "pretrained", "path": str(folder / "teacher")}
    inner = {"type": "online", "path": str(folder / "other")}
    recipe["teacher"] = {"type": "cross_tokenizer", "teacher": inner}
    recipe["data"] = {"type": "chat", "path": str(folder / "chat.jsonl"), "sequence_length": 160}
    recipe["evaluate"]["data"] = str(folder / "chat.jsonl")
    recipe["optim"]["tokens_per_step"] = 320
    path.write_text(json.dumps(recipe))
    return path


def parts_of(path, *options):
    return limbeck.assemble(load(path, options))


@pytest.mark.parametrize(
    ("kind", "template"), [("bpe", HEADED), ("unigram", SPACED), ("bpe", SPACED)]
)
def test_the_teacher_is_compared_after_the_same_part_of_an_answer(tmp_path, kind, template):
    """The slow way: the teacher reads its template's text up to the same byte of the answer."""
    backend = unigram(600, end=STOP) if kind == "unigram" else None
    theirs = teacher_tokenizer(backend, template)
    chats = conversations()
    with parts_of(write_pair(tmp_path, theirs, chats)) as run:
        teacher, data = run.parts.teacher, run.parts.data
        batch = data.batch(range(data.num_rows))
        (part,) = teacher.signal(batch).parts
        model = teacher.model
    compared = set()
    places = batch.scored.nonzero()[part.positions].tolist()
    for n, (row, column) in enumerate(places):
        document = int(batch.document_ids[row, column])
        start = column - int(batch.position_ids[row, column])
        text = small(template=CHATML).decode(batch.input_ids[row, start : column + 1].tolist())
        if "\ufffd" in text or n % 5:
            continue
        tokens = read_tokens(text, chats[document], theirs)
        logits = model.logits(torch.tensor([tokens]))[0, -1:]
        own = part.distribution.member.rows(slice(n, n + 1)).logits()
        torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)
        compared.add((document, text))
    assert len(compared) > 20
    assert len(places) > 0.3 * int(batch.num_scored())


def read_tokens(text, messages, theirs):
    """The teacher's tokens up to the place where the student has read this text."""
    turn = text.count("assistant\n") - 1
    answer = text.rpartition("assistant\n")[2]
    space = " " if theirs.chat_template == SPACED else ""
    prompt = theirs.apply_chat_template(
        messages[: 2 * turn + 1], tokenize=False, add_generation_prompt=True
    )
    whole = theirs(theirs.apply_chat_template(messages, tokenize=False))["input_ids"]
    ends = [n for n in range(len(whole)) if theirs.decode(whole[:n]) == prompt + space + answer]
    assert ends, f"no token of the teacher ends after {prompt + space + answer!r}"
    return whole[: ends[0]]


def test_equal_tokenizers_and_templates_compare_every_position(tmp_path):
    theirs = small(template=CHATML)
    with parts_of(write_pair(tmp_path, theirs)) as run:
        teacher, data = run.parts.teacher, run.parts.data
        batch = data.batch(range(data.num_rows))
        (part,) = teacher.signal(batch).parts
        assert part.positions.tolist() == list(range(int(batch.num_scored())))
        plain = LocalTeacher(teacher.model)
        plain.require(TeacherRequest(needs=teacher._needs, vocabulary_size=len(theirs)))
        wanted = log_softmax(plain.signal(batch).distribution.logits(), 1.0)
    of = part.distribution.outcomes.student
    torch.testing.assert_close(part.distribution.at(1.0)[:, of], wanted, rtol=0, atol=1e-4)


def test_a_long_conversation_is_read_from_the_last_place_in_common(tmp_path):
    path = write_pair(tmp_path, teacher_tokenizer())
    with parts_of(path) as whole, parts_of(path, "data.sequence_length=24") as cut:
        counts = []
        for run in (whole, cut):
            data = run.parts.data
            batch = data.batch(range(data.num_rows))
            (part,) = run.parts.teacher.signal(batch).parts
            counts.append((len(part.positions), int(batch.num_scored())))
            reading = run.parts.teacher.reread(batch)
    assert len(data.windows) > data.num_documents
    assert counts[1][1] <= counts[0][1]
    assert counts[1][0] > 0.9 * counts[0][0] * counts[1][1] / counts[0][1]
    read = reading.batch.position_ids[reading.batch.document_ids >= 0]
    assert int(read.max()) < 3 * 24


def test_a_run_of_conversations_trains_and_measures(tmp_path):
    path = write_pair(
        tmp_path, teacher_tokenizer(), optim={"steps": 2, "warmup_steps": 0}, evaluate={"every": 2}
    )
    options = ["objective.extra=[{type: alm, weight: 0.5}]", "objective.alpha=0.5"]
    with parts_of(path, *options) as run:
        run.train()
    steps = steps_of(tmp_path / "run")
    assert all(step["divergence"] > 0 and step["alm"] > 0 for step in steps)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["trials"]["distilled"]["forward_kl"]["value"] > 0
    notes = json.loads((tmp_path / "run" / "provenance.json").read_text())["vocabulary"]["notes"]
    (coverage,) = [note for note in notes if note.startswith("Coverage of the student")]
    assert "special tokens 100%" in coverage


def test_answers_that_one_template_changes_are_named_and_can_be_skipped(tmp_path):
    upper = HEADED.replace("m.content", "m.content | upper", 1)
    path = write_pair(tmp_path, teacher_tokenizer(template=upper))
    with pytest.raises(
        DataError, match=r"chat\.jsonl:1: the chat templates write an answer .* after 2 ch"
    ):
        parts_of(path)
    rows = conversations()
    rows[5] = chat(5, "42.", "7!")
    path = write_pair(tmp_path, teacher_tokenizer(template=upper), rows)
    with parts_of(path, "teacher.unaligned=skip", "teacher.uncovered=skip") as run:
        data = run.parts.data
        (part,) = run.parts.teacher.signal(data.batch(range(data.num_rows))).parts
        assert len(part.positions) > 0
        assert any("cannot be aligned as a whole" in note for note in run.parts.notes)


def test_white_space_that_one_template_removes_leaves_the_rest_aligned(tmp_path):
    trimmed = HEADED.replace("m.content", "m.content | trim")
    rows = [chat(n, f"{ANSWERS[n % 3][0]}\n", ANSWERS[n % 3][1]) for n in range(12)]
    counts = []
    for name, template, chats in (
        ("a", HEADED, conversations()), ("b", trimmed, rows), ("c", HEADED, rows)
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        path = write_pair(tmp_path / name, teacher_tokenizer(template=template), chats)
        with parts_of(path) as run:
            data = run.parts.data
            (part,) = run.parts.teacher.signal(data.batch(range(data.num_rows))).parts
            counts.append(len(part.positions))
    assert counts[0] - 2 * 12 <= counts[1] < counts[2]


def test_a_conversation_that_the_teachers_template_refuses_is_named(tmp_path):
    refusing = "{{ raise_exception('no') if messages[0].content == 'refuse' }}" + HEADED
    rows = conversations()
    rows[7] = [{"role": "user", "content": "refuse"}, *rows[7][1:]]
    path = write_pair(tmp_path, teacher_tokenizer(template=refusing), rows)
    wanted = r"data, in the teacher's chat template: .*\n.*chat\.jsonl:8: .*template refuses them"
    with pytest.raises(DataError, match=wanted):
        parts_of(path)
    with parts_of(path, "data.bad_rows=skip", "teacher.unaligned=skip") as run:
        data, teacher = run.parts.data, run.parts.teacher
        (index,) = teacher._known.aligner._texts[:1]
        assert index.their_documents.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, 7, 8, 9, 10]
        (part,) = teacher.signal(data.batch(range(data.num_rows))).parts
        assert len(part.positions) > 0


def test_a_teacher_without_a_chat_template_is_refused(tmp_path):
    path = write_pair(tmp_path, teacher_tokenizer(template=None))
    with pytest.raises(ConfigError, match=r"the teacher's tokenizer has none\. Use a chat model"):
        parts_of(path)


def test_the_end_of_an_answer_is_matched_where_the_end_tokens_are_others():
    """Gemma's turns end with another token than its texts."""
    turned = CHATML.replace("{{ m.content }}<|end|>", "{{ m.content }}<|turn|>", 1)
    ours, theirs = small(template=turned), teacher_tokenizer()
    model = LocalTeacher(tiny_llama(1, 32, vocabulary=len(theirs)), tokenizer=theirs)
    turn = ours.convert_tokens_to_ids("<|turn|>")
    for uses_template, ends in ((True, (turn, ours.eos_token_id)), (False, (ours.eos_token_id,))):
        outcomes = make_pair(ours, model, uses_template=uses_template).outcomes
        for end in ends:  # the teacher has one token for the ends of answers and of texts
            assert outcomes.student[end] == outcomes.teacher[theirs.eos_token_id]
            assert outcomes.student[end] < outcomes.num_outcomes
    own = make_pair(small(template=CHATML), model, uses_template=True).outcomes
    assert own.student[turn] == own.num_outcomes


def test_an_end_of_turn_is_found_that_no_map_of_special_tokens_names():
    tokenizer = teacher_tokenizer(template=HEADED.replace("eos_token", "' [stop]'"))
    assert end_of_answer(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_tokens([AddedToken("[stop]", special=True)])
    assert "[stop]" not in tokenizer.all_special_tokens
    assert end_of_answer(tokenizer) == tokenizer.convert_tokens_to_ids("[stop]")


def test_a_mixture_aligns_texts_by_bytes_and_conversations_by_answers(tmp_path):
    path = write_pair(tmp_path, teacher_tokenizer())
    recipe = json.loads(path.read_text())
    texts = [json.dumps({"text": f"{n}. {a} {b}"}) for n in range(4) for a, b in ANSWERS]
    (tmp_path / "plain.jsonl").write_text("\n".join(texts))
    del recipe["data"]["path"], recipe["data"]["type"]
    recipe["data"]["mix"] = [
        {"path": str(tmp_path / "plain.jsonl"), "type": "text"},
        {"path": str(tmp_path / "chat.jsonl"), "type": "chat"},
    ]
    path.write_text(json.dumps(recipe))
    with parts_of(path) as run:
        data = run.parts.data
        assert data.is_conversation.tolist() == [False] * 12 + [True] * 12
        for row in range(data.num_rows):
            batch = data.batch([row])
            (part,) = run.parts.teacher.signal(batch).parts
            assert len(part.positions) > 0.3 * int(batch.num_scored())


# One conversation in two renderings.


def sides_of(student_text, teacher_text, **options):
    """Both renderings of texts in which { } mark the answers, aligned, with their tokens."""
    ours, theirs = small(template=CHATML), teacher_tokenizer()
    turn_ends = (ours.eos_token_id, theirs.eos_token_id)
    pair = [
        TokenBytes(tokenizer, who, end)
        for tokenizer, who, end in zip(
            (ours, theirs), ("student", "teacher"), turn_ends, strict=True
        )
    ]
    renderings = [
        marked_rendering(*each) for each in ((ours, student_text), (theirs, teacher_text))
    ]
    found = align_conversation(Aligner(*pair), *renderings, **options)
    return found, *renderings, pair


def marked_rendering(tokenizer, text):
    ids, scored = [], []
    for number, part in enumerate(re.split("[{}]", text)):
        tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        scored += [number % 2 == 1] * len(tokens)
    return Rendering(np.array(ids), np.array(scored))


def compared(found, ours, theirs, pair):
    """For each scored token that is compared: the answer's text before it on both sides."""
    rows = []
    for n in np.flatnonzero(ours.scored[1:] & (found.standing[:-1] >= 0)).tolist():
        read = [
            b"".join(side.bytes_of[i] for i in ids.tolist()).decode()
            for side, ids in zip(
                pair, (ours.ids[: n + 1], theirs.ids[: found.standing[n] + 1]), strict=True
            )
        ]
        rows.append(tuple(text.rpartition("A:")[2] for text in read))
    return rows


@pytest.mark.parametrize(
    ("student", "teacher", "last"),
    [
        ("Q A:{ab cd<|end|>}", "Q A:{ab cd</s>}", ("ab cd", "ab cd")),
        ("Q A:{ab cd<|end|>\n}", "Q A:{ab cd</s>}[fin]", ("ab cd", "ab cd")),
        ("Q A:{ab cd<|turn|>x<|end|>}", "Q A:{ab cd</s>}", ("ab cd", "ab cd")),
        ("Q A:{ab cd\n<|end|>}", "Q A:{ab cd</s>}", ("ab cd", "ab cd")),
        ("Q A:{\n\nab cd<|end|>}", "Q A:{ab cd</s>}", ("\n\nab cd", "ab cd")),
        ("Q A:{ab cd<|end|>}", "Q A:{  ab cd</s>}", ("ab cd", "  ab cd")),
        ("Q A:{ab cd\u00a0<|end|>}", "Q A:{ab cd</s>}", ("ab cd", "ab cd")),
        ("Q A:{ab cd\n<|end|>}", "Q A:{ab cd\n</s>}", ("ab cd\n", "ab cd\n")),
    ],
)
def test_both_sides_have_read_the_same_answer_wherever_they_are_compared(student, teacher, last):
    found, ours, theirs, pair = sides_of(student, teacher)
    rows = compared(found, ours, theirs, pair)
    assert all(a.strip() == b.strip() for a, b in rows)
    assert rows[-1] == last
    chunks = found.chunks(ours.scored)
    for number in range(chunks.num_chunks):
        texts = [
            b"".join(side.bytes_of[i] for i in each.ids[of == number].tolist())
            for side, each, of in zip(
                pair, (ours, theirs), (chunks.student, chunks.teacher), strict=True
            )
        ]
        assert texts[0] == texts[1] or texts == [b"<|end|>", b"</s>"]


def test_an_answer_that_differs_can_be_left_out_by_itself():
    texts = ("Q A:{ab<|end|>}Q A:{cd<|end|>}", "Q A:{think ab</s>}Q A:{cd</s>}")
    assert "after 0 characters: 'ab' the student's" in sides_of(*texts)[0]
    found, ours, theirs, pair = sides_of(*texts, skip=True)
    assert ("cd", "cd") in compared(found, ours, theirs, pair)
    assert not any("ab" in "".join(row) for row in compared(found, ours, theirs, pair))


def test_a_window_in_a_long_prompt_begins_at_the_same_share_of_it():
    found, ours, *_ = sides_of("word " * 400 + "A:{ab cd<|end|>}", "word " * 400 + "A:{ab cd</s>}")
    for start in (1, len(ours.ids) // 2, len(ours.ids) - 30):
        part = part_of(found, slice(start, len(ours.ids)), ())
        share = (len(ours.ids) - start) / len(ours.ids)
        assert len(part.teacher_ids) <= share * len(found.teacher_ids) + 8
        assert (part.standing >= 0).sum() == (found.standing[start:] >= 0).sum()


def test_windows_of_equal_tokens_are_aligned_by_a_conversation_that_can_be(tmp_path):
    bad = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes. " * 12 + "BAD"}]
    good = [bad[0], {"role": "assistant", "content": "Yes. " * 12 + "all"}]
    template = HEADED.replace("{{ m.content }}", "{{ m.content | replace('BAD', 'bad') }}")
    path = write_pair(tmp_path, teacher_tokenizer(template=template), [bad, *[good] * 11])
    options = ["data.sequence_length=24", "optim.tokens_per_step=48", "evaluate.data=null"]
    with pytest.raises(DataError, match=r"1 of .* windows are not:\n  data: chat\.jsonl:1: "):
        parts_of(path, *options)


def test_coverage_counts_the_tokens_of_answers_on_both_sides():
    found, ours, theirs, pair = sides_of("Q A:{ ab<|end|>}" * 9, "Q A:{ab</s>}" * 9)
    coverage, outcomes = Coverage(), shared_outcomes(*pair)
    classes = classes_of(pair[0]), classes_of(pair[1])
    add_coverage(coverage, ours.ids, ours.scored, found, outcomes, classes)
    for who, rendering in (("student", ours), ("teacher", theirs)):
        counts = coverage.directions[who].values()
        assert sum(count.tokens for count in counts) == int(rendering.scored.sum())
