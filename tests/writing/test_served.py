"""A teacher in a server writes what the local one writes."""

import json
from collections import Counter

import pytest
import torch

from limbeck.errors import ConfigError, DataError
from limbeck.models import ModelSource, load_model
from limbeck.teachers import LocalTeacher
from limbeck.tokenizers import load_tokenizer
from tests.teachers.serving import NAME, TinyServer
from tests.writing.tiny_writer import rows_of, writing_recipe, written


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    path = writing_recipe(tmp_path)
    source = ModelSource(str(tmp_path / "teacher"))
    model = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(source.path)
    serving = TinyServer(LocalTeacher(model), tokenizer, max_model_len=128)
    spec = {"type": "served", "url": serving.url, "model": NAME, "k": 8, "path": source.path}
    serving.recipe, serving.override = path, f"teacher={json.dumps(spec)}"
    yield serving
    serving.kill()


def without_origin(path):
    own = ("seed", "finish", "tokens", "prompt", "answer")
    return [
        {**row, "provenance": {name: row["provenance"][name] for name in own}}
        for row in rows_of(path)
    ]


def test_a_served_teacher_writes_the_local_ones_file(server, tmp_path):
    local = written(server.recipe)
    served = written(server.recipe, server.override, f"write.output={tmp_path / 'served.jsonl'}")
    assert without_origin(served.output) == without_origin(local.output)
    assert served.progress.dropped == local.progress.dropped
    assert {row["provenance"]["teacher"] for row in rows_of(served.output)} == {NAME}
    body = server.requests[-1]
    expected = {
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    assert expected.items() <= body.items()
    prompts = Counter(tuple(each["prompt"]) for each in server.requests if "seed" in each)
    assert set(prompts.values()) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": "abort"}, "end with 'stop' or 'length', and ended with 'abort'"),
        ({"logprobs": None}, "have a log-probability of every token"),
        ({"prompt_token_ids": [1, 2]}, "be to the token ids that were sent"),
        (
            {"token_ids": [5], "logprobs": {"token_logprobs": [3.0]}},
            "log-probabilities of at most 0",
        ),
    ],
)
def test_an_invalid_answer_of_the_server_is_refused(change, message, server):
    def lie(answer, body):
        if "seed" in body:
            answer["choices"][0] |= change
        return answer

    server.lie = lie
    with pytest.raises(DataError, match=message):
        written(server.recipe, server.override)


def test_a_server_that_is_only_read_is_refused_before_anything_is_written(tmp_path, server):
    server.kind = "sglang"
    override = server.override.replace('"type": "served"', '"type": "served", "server": "sglang"')
    with pytest.raises(ConfigError, match=r"teacher\.server: must be vllm .* got sglang"):
        written(server.recipe, override, f"write.output={tmp_path / 'none.jsonl'}")
    assert not (tmp_path / "none.jsonl").exists()
