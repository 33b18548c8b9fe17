"""Tokenizers from folders, GGUF files and the hub, and what is said when there is none."""

import json
from pathlib import Path

import gguf
import huggingface_hub.constants
import pytest
from transformers import PreTrainedTokenizerBase

from limbeck.errors import ConfigError, LimbeckError, TryLaterError
from limbeck.tokenizers import backend_of, load_tokenizer, tokenizer_hash
from tests.tokenizers.refusing_hub import refusing_hub
from tests.tokenizers.small import backend, small


def write_gguf(path: Path, pre: str) -> None:
    """A GGUF file with the small tokenizer and no weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_vocab_size(backend().get_vocab_size())
    add_small(writer, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def add_small(writer: gguf.GGUFWriter, pre: str) -> None:
    """The small tokenizer, as llama.cpp keeps one."""
    model = backend()
    vocabulary = model.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def test_a_saved_folder_loads_as_what_was_saved(tmp_path: Path) -> None:
    tokenizer = small()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(tokenizer)


def test_a_smollm_gguf_file_splits_digits_one_by_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "digits.gguf", "smollm")
    write_gguf(tmp_path / "plain.gguf", "gpt-2")
    digits = load_tokenizer(str(tmp_path / "digits.gguf"))
    plain = load_tokenizer(str(tmp_path / "plain.gguf"))
    assert digits.tokenize("in 1994") == ["in", "Ġ", "1", "9", "9", "4"]
    assert plain.tokenize("in 1994") != digits.tokenize("in 1994")
    assert digits.tokenize("a still") == plain.tokenize("a still")
    assert digits.model_max_length == 96


def test_an_invalid_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one at all, but long enough to be read")
    with pytest.raises(ConfigError, match=r"x\.gguf must be a GGUF file"):
        load_tokenizer(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "a/b/c", "nowhere.gguf"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(path: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder or a \.gguf file, and does not exist"):
        load_tokenizer(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must hold a tokenizer that transformers can open"):
        load_tokenizer(str(tmp_path))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"Name the folder that holds tokenizer\.json"):
        load_tokenizer(str(tmp_path / "model.safetensors"))


def test_a_hub_name_without_the_hub_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TryLaterError, match=r"no folder here.*Start again later"):
        load_tokenizer("limbeck-tests/no-such-model")


@pytest.mark.parametrize(
    ("status", "code", "error", "text"),
    [
        (404, "RepoNotFound", ConfigError, "must be a path here or a model on the Hugging Face"),
        (404, "RevisionNotFound", ConfigError, "at revision 'v9' must be a path here or a model"),
        (403, "GatedRepo", ConfigError, "only to those who accepted its terms"),
        (429, "", TryLaterError, "not in the local cache, and .* is out of reach or busy"),
        (503, "", TryLaterError, "not in the local cache, and .* is out of reach or busy"),
    ],
)
def test_errors_of_the_hub_become_messages_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, error: type[LimbeckError], text: str
) -> None:
    with refusing_hub(status, code) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(error, match=text):
            load_tokenizer("limbeck-tests/refused", revision="v9")


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow(PreTrainedTokenizerBase):
        pass

    with pytest.raises(ConfigError, match=r"must be a fast one .* is a Slow"):
        backend_of(Slow())


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    small().save_pretrained(tmp_path / "model")
    assert load_tokenizer("~/model").get_vocab() == small().get_vocab()
