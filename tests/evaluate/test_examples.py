import pytest
import torch

from limbeck.batch import Batch
from limbeck.evaluate.examples import continuations, disagreements, prompts
from limbeck.evaluate.measure import measure
from limbeck.evaluate.speed import speeds
from limbeck.evaluate.text import left_context, token_text
from limbeck.teachers import LocalTeacher
from tests.evaluate.held_out import Rows, packed_rows
from tests.evaluate.word_tokenizer import Words
from tests.models.tiny import tiny_llama


def per_token_kl(student, teacher, data: Rows) -> dict[tuple[int, int], float]:
    found = {}
    w = data.whole
    for row, t in w.scored.nonzero().tolist():
        begin = t - int(w.position_ids[row, t])
        piece = w.input_ids[row, begin : t + 1][None]
        with torch.no_grad():
            p = teacher.logits(piece)[0, -1].double().log_softmax(-1)
            q = student.logits(piece)[0, -1].double().log_softmax(-1)
        found[row, t] = float((p.exp() * (p - q)).sum())
    return found


def test_disagreements_are_the_worst_token_of_each_document_worst_first() -> None:
    student, teacher = tiny_llama(2, 32, seed=1), tiny_llama(2, 32, seed=2)
    data, words = packed_rows(), Words()
    told = disagreements(student, LocalTeacher(teacher), words, data, range(6), count=4)
    worst: dict[int, tuple[float, int, int]] = {}
    for (row, t), kl in per_token_kl(student, teacher, data).items():
        document = int(data.whole.document_ids[row, t])
        worst[document] = max(worst.get(document, (0.0, 0, 0)), (kl, row, t))
    wanted = sorted(worst.items(), key=lambda item: -item[1][0])[:4]
    assert [d["document"] for d in told] == [data.document_name(document) for document, _ in wanted]
    for place, (_, (kl, row, t)) in zip(told, wanted, strict=True):
        assert place["forward_kl"] == pytest.approx(kl, rel=1e-4)
        assert place["target"].strip() == words.words[int(data.whole.target_ids[row, t])]
        begin = t - int(data.whole.position_ids[row, t])
        assert place["context"].endswith(
            words.decode(data.whole.input_ids[row, begin : t + 1].tolist())
        )


def test_a_disagreement_lists_the_most_probable_tokens_of_both_in_order() -> None:
    student, teacher = tiny_llama(2, 32, seed=1), tiny_llama(2, 32, seed=2)
    place = disagreements(
        student, LocalTeacher(teacher), Words(), packed_rows(), range(6), count=1
    )[0]
    for who in ("teacher", "student"):
        probabilities = [p for _, p in place[who]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) < 1


def long_rows() -> Rows:
    data = packed_rows(rows=4, length=60)
    w = data.whole
    places = torch.arange(60).expand(4, 60)
    documents = torch.arange(4)[:, None].expand(4, 60)
    scored = torch.ones_like(w.scored)
    scored[3, :40] = False  # a long question
    return Rows(Batch(w.input_ids, w.target_ids, scored, places, documents), data.document_bytes)


def test_prompts_are_the_first_tokens_or_the_whole_question() -> None:
    data = long_rows()
    cuts = []
    for (prompt, truth), row in zip(prompts(Words("W"), data, range(4), 4), range(4), strict=True):
        w = data.whole
        assert [*prompt, *truth] == [*w.input_ids[row].tolist(), int(w.target_ids[row, -1])]
        cuts.append(len(prompt))
    assert cuts == [24, 24, 24, 41]


def test_windows_from_the_middle_of_a_text_begin_at_its_first_new_line() -> None:
    data, words = long_rows(), Words()
    line = int(data.whole.input_ids[0, 9])
    first = data.whole.input_ids[0].tolist().index(line)
    words.words[line] = "\n"
    prompt, truth = prompts(words, data, [0], 1)[0]
    assert [*prompt, *truth] == [
        *data.whole.input_ids[0, first + 1 :].tolist(),
        int(data.whole.target_ids[0, -1]),
    ]
    question, _ = prompts(words, data, [3], 1)[0]
    assert question == data.whole.input_ids[3, :41].tolist()


def test_short_texts_give_no_prompts() -> None:
    assert prompts(Words(), packed_rows(), range(6), 3) == []


def test_continuations_are_what_each_model_writes_after_the_same_prompt() -> None:
    models = {"teacher": tiny_llama(2, 32, seed=1), "distilled": tiny_llama(2, 32, seed=2)}
    words = Words()
    told = continuations(models, words, long_rows(), range(4), count=2, max_new_tokens=5)
    assert len(told) == 2
    for sample in told:
        assert list(sample) == ["prompt", "truth", "teacher", "distilled"]
        prompt = words.encode(sample["prompt"])
        assert len(words.encode(sample["truth"])) == 5
        for name, model in models.items():
            ids = list(prompt)
            for _ in range(5):
                ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
            assert words.encode(sample[name]) == ids[len(prompt) :]


def test_a_token_keeps_the_space_it_adds_behind_its_neighbours() -> None:
    words = Words()
    assert token_text(words, [1, 2], 3) == " w3"
    assert token_text(words, [], 3) == "w3"


def test_long_contexts_are_cut_at_a_word() -> None:
    told = left_context(Words(), list(range(90)))
    assert told.startswith("…w")
    assert told.endswith(" w89")
    assert 100 < len(told) <= 121


def test_measured_tokens_and_disagreements_agree_on_the_largest() -> None:
    student, teacher = tiny_llama(2, 32, seed=1), tiny_llama(2, 32, seed=2)
    data = packed_rows()
    scores = measure(
        student, LocalTeacher(teacher), data, range(6), micro_batch=3, device=torch.device("cpu")
    )
    top = disagreements(student, LocalTeacher(teacher), Words(), data, range(6), count=1)[0][
        "forward_kl"
    ]
    assert top >= scores.mean("forward_kl")


def test_speed_is_measured_of_each_model_and_keeps_its_training_mode() -> None:
    small, large = tiny_llama(1, 32), tiny_llama(6, 64)
    small.train()
    told = speeds({"small": small, "large": large})
    assert set(told) == {"small", "large"}
    assert min(told.values()) > 0
    assert small.training
    assert speeds({"small": small})["small"] > 0
