"""Prompts are what the chat template and the tokenizer would give a model to continue."""

import json

import pytest

from limbeck.config import DataConfig
from limbeck.data import load_data
from limbeck.rollouts import Prompts
from tests.tokenizers.small import CHATML, MARKED, small

CHATS = [
    [("user", "what rises?"), ("assistant", "the spirit")],
    [("system", "be short"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    [("user", "a"), ("assistant", "b"), ("user", "and then?")],
    [("user", "nobody answers")],
]


def read(folder, rows, tokenizer, **options):
    path = folder / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = DataConfig(path=str(path), **{"sequence_length": 64, **options})
    return load_data(config, tokenizer, cache=folder / "cache", max_positions=None)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_chat_is_read_up_to_its_last_answer_with_the_generation_prompt(template, tmp_path):
    tokenizer = small(template=template)
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
    data = read(tmp_path, [{"messages": chat} for chat in chats], tokenizer, type="chat")
    prompts = Prompts(data, longest=60)
    expected = []
    for chat in chats[:3]:
        last = max(i for i, message in enumerate(chat) if message["role"] == "assistant")
        text = tokenizer.apply_chat_template(
            chat[:last], tokenize=False, add_generation_prompt=True
        )
        expected.append(tokenizer(text, add_special_tokens=False).input_ids)
    assert list(prompts) == expected
    assert (prompts.too_short, prompts.too_long) == (1, 0)


def test_a_completion_has_its_own_prompt(tmp_path):
    tokenizer = small()
    rows = [{"prompt": "A still boils", "completion": " the wash."}] * 2
    prompts = Prompts(read(tmp_path, rows, tokenizer, type="completion"), longest=60)
    assert list(prompts) == [tokenizer("A still boils").input_ids] * 2


def test_a_text_gives_its_first_tokens_if_more_follow(tmp_path):
    tokenizer = small()
    texts = ["A still boils the wash and catches what rises.", "A", "12345"]
    data = read(tmp_path, [{"text": t} for t in texts], tokenizer, type="text", append_eos=False)
    prompts = Prompts(data, longest=60, first_tokens=5)
    assert list(prompts) == [tokenizer(texts[0]).input_ids[:5]]
    assert prompts.too_short == 2
    assert prompts[:] == list(prompts)
    assert prompts.mean_length == 5


def test_prompts_without_room_for_a_rollout_are_left_out(tmp_path):
    tokenizer = small(template=CHATML)
    chats = [
        [{"role": "user", "content": "why? " * n}, {"role": "assistant", "content": "so"}]
        for n in (1, 60)
    ]
    data = read(tmp_path, [{"messages": chat} for chat in chats], tokenizer, type="chat")
    prompts = Prompts(data, longest=40)
    assert (len(prompts), prompts.too_long) == (1, 1)
    assert prompts[0] == Prompts(data, longest=1000)[0]
    assert len(Prompts(data, longest=1000)[1]) > 60
