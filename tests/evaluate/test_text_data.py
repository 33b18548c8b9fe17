"""Evaluation on text as the data room reads it, from the file to the figures."""

import json
import math
from pathlib import Path

import pytest
import torch

from limbeck.config import DataConfig
from limbeck.data import TextData, load_data
from limbeck.evaluate.examples import continuations, disagreements
from limbeck.evaluate.measure import measure
from limbeck.evaluate.scores import summarise
from limbeck.rollouts import Prompts
from limbeck.teachers import LocalTeacher
from tests.models.tiny import tiny_llama
from tests.tokenizers.small import small

TEXTS = ["The still drips. " * 12, "Den Alembik über naïve façade.", "A third text, a short one."]


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    config = DataConfig(type="text", path=str(path), sequence_length=32, append_eos=False)
    return load_data(config, small(), cache=tmp_path / "cache", max_positions=64)


def test_bits_per_byte_is_counted_over_the_text_that_was_scored(data: TextData) -> None:
    tokenizer = small()
    student, teacher = (tiny_llama(2, 32, vocabulary=len(tokenizer), seed=s) for s in (1, 2))
    rows = range(data.num_rows)
    scores = measure(
        student, LocalTeacher(teacher), data, rows, micro_batch=3, device=torch.device("cpu")
    )
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert scores.counts.tolist() == [len(i) - 1 for i in ids]  # a first token follows nothing
    scored = [len(tokenizer.decode(i[1:]).encode()) for i in ids]
    assert scores.bytes.tolist() == scored
    bits = scores.metrics["cross_entropy"].sum() / math.log(2)
    assert summarise(scores)["bits_per_byte"]["value"] == pytest.approx(bits / sum(scored))


def test_places_of_real_text_are_named_and_readable(data: TextData) -> None:
    tokenizer = small()
    student, teacher = (tiny_llama(2, 32, vocabulary=len(tokenizer), seed=s) for s in (1, 2))
    told = disagreements(
        student, LocalTeacher(teacher), tokenizer, data, range(data.num_rows), count=9
    )
    assert len(told) == 3
    # What is shared names the file and no folder of this machine.
    assert {place["document"] for place in told} == {f"held.jsonl:{line}" for line in (1, 2, 3)}
    for place in told:
        text = TEXTS[int(place["document"].rpartition(":")[2]) - 1]
        assert place["context"].lstrip("…")[-8:] + place["target"] in text or "\ufffd" in str(place)


def test_continuations_are_what_each_model_writes_after_the_same_prompt(data: TextData) -> None:
    tokenizer = small()
    models = {
        name: tiny_llama(2, 32, vocabulary=len(tokenizer), seed=seed)
        for seed, name in enumerate(("teacher", "distilled"))
    }
    prompts = Prompts(data, longest=60, first_tokens=5)
    told = continuations(models, tokenizer, prompts, count=2, max_new_tokens=9)
    assert len(told) == 2
    for sample, prompt, text in zip(told, prompts, TEXTS, strict=False):
        assert list(sample) == ["prompt", "truth", "teacher", "distilled"]
        assert sample["prompt"] + sample["truth"] == tokenizer.decode(tokenizer.encode(text)[:14])
        for name, model in models.items():
            ids = list(prompt)
            for _ in range(9):
                ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
            assert sample[name] == tokenizer.decode(ids[len(prompt) :])


def test_a_text_without_eight_tokens_after_its_prompt_is_not_continued(data: TextData) -> None:
    lengths = sorted(len(small().encode(text)) for text in TEXTS)
    for first, left in ((lengths[0] - 8, 3), (lengths[0] - 7, 2), (lengths[2] - 7, 0)):
        prompts = Prompts(data, longest=1000, first_tokens=first)
        assert len(continuations({}, small(), prompts, count=9)) == left
