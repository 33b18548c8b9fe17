import pytest
import torch

from limbeck.evaluate.examples import disagreements
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
