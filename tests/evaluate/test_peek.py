import json
import math

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.evaluate.peek import peek
from tests.evaluate.word_tokenizer import Words
from tests.models.tiny import tiny_llama

TEXT = "w5 w17 w3 w80"


def test_probabilities_are_softmaxes_of_the_models_logits_at_each_temperature() -> None:
    teacher, student = tiny_llama(2, 32, seed=1), tiny_llama(2, 32, seed=2)
    seen = peek(Words(), teacher, student, TEXT, [2.0, 4.0])
    ids = torch.tensor([Words().encode(TEXT)])
    with torch.no_grad():
        theirs, ours = teacher.logits(ids)[0].double(), student.logits(ids)[0].double()
    assert seen.temperatures == (1.0, 2.0, 4.0)
    for t, position in enumerate(seen.positions):
        for i, temperature in enumerate(seen.temperatures):
            p = torch.softmax(theirs[t] / temperature, -1)
            q = torch.softmax(ours[t] / temperature, -1)
            for candidate in position.candidates:
                assert candidate.teacher[i] == pytest.approx(float(p[candidate.id]), rel=1e-4)
                assert candidate.student[i] == pytest.approx(float(q[candidate.id]), rel=1e-4)
            assert position.entropy[i] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
            kl = float((p * (p / q).log()).sum())
            assert position.forward_kl[i] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert position.student_probability == pytest.approx(
            float(torch.softmax(ours[t], -1).max()), rel=1e-4
        )


def test_the_token_that_followed_is_always_there_and_the_last_position_has_none() -> None:
    seen = peek(Words(), tiny_llama(2, 32, seed=1), None, TEXT, [2.0], top=2)
    followed = [[c.text for c in p.candidates if c.followed] for p in seen.positions]
    assert followed == [[" w17"], [" w3"], [" w80"], []]
    assert [len(p.candidates) for p in seen.positions[3:]] == [2]
    assert all(p.student_first is None and not p.forward_kl for p in seen.positions)


def test_ranks_say_how_many_tokens_are_likelier() -> None:
    seen = peek(Words(), tiny_llama(2, 32, seed=1), None, TEXT, [1.0], top=3)
    for position in seen.positions:
        assert [c.rank for c in position.candidates[:3]] == [1, 2, 3]
        assert all(c.rank > 3 for c in position.candidates[3:])


def test_a_higher_temperature_is_flatter_and_less_sure() -> None:
    seen = peek(Words(), tiny_llama(2, 32, seed=1), None, TEXT, [1.0, 2.0, 4.0, 1e6])
    for position in seen.positions:
        assert list(position.entropy) == sorted(position.entropy)
        assert position.entropy[-1] == pytest.approx(math.log(96), rel=1e-4)
        assert list(position.candidates[0].teacher) == sorted(
            position.candidates[0].teacher, reverse=True
        )


def test_a_student_equal_to_the_teacher_has_zero_kl() -> None:
    model = tiny_llama(2, 32, seed=1)
    seen = peek(Words(), model, model, TEXT, [2.0])
    assert all(p.forward_kl == (0.0, 0.0) for p in seen.positions)


def test_a_peek_is_the_same_after_json() -> None:
    seen = peek(Words(), tiny_llama(2, 32), tiny_llama(1, 32), TEXT, [2.0])
    plain = json.loads(json.dumps(seen.to_plain(), allow_nan=False))
    assert plain["positions"][0]["candidates"][0]["text"].startswith(" w")


@pytest.mark.parametrize(("text", "warm"), [("", [1.0]), ("w1 " * 65, [1.0]), ("w1", [0.0])])
def test_invalid_texts_and_temperatures_are_refused(text: str, warm: list[float]) -> None:
    with pytest.raises(ConfigError, match="must"):
        peek(Words(), tiny_llama(1, 32), None, text, warm)
