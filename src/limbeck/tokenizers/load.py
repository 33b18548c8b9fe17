"""Opening a tokenizer from a folder, the Hugging Face hub or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.config.paths import is_hub_name
from limbeck.errors import ConfigError, LimbeckError, TryLaterError
from limbeck.files import expanded
from limbeck.tokenizers.hub import hub_answers

__all__ = ["backend_of", "hub_answers", "load_tokenizer"]


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        path: A folder, a .gguf file, or a name on the Hugging Face hub. Whatever exists here is
            taken from here.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python that the model's author ships with the tokenizer.

    Raises:
        ConfigError: It does not exist, is not readable, or is not a fast tokenizer.
        TryLaterError: It is not cached, and the hub is out of reach or busy.
    """
    here = expanded(path)
    if here.is_file() and here.suffix == ".gguf":
        return from_gguf(here)
    if here.is_file():
        raise ConfigError(
            f"A tokenizer is a folder, a .gguf file or a name on the hub; {path} is another file. "
            "Name the folder that holds tokenizer.json."
        )
    if not here.is_dir() and not is_hub_name(path):
        raise ConfigError(f"{path} must be a folder or a .gguf file, and does not exist. Check it.")
    local_only = here.is_dir() or not hub_answers(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(here) if here.is_dir() else path,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=local_only,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        is_away = local_only and not here.is_dir()
        kind: type[LimbeckError] = TryLaterError if is_away else ConfigError
        raise kind(why_not(path, here.is_dir(), local_only, error)) from error
    backend_of(tokenizer)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def why_not(path: str, is_folder: bool, offline: bool, error: Exception) -> str:
    """Why a tokenizer could not be opened, and what to do."""
    reason = str(error).partition("\n")[0]
    if is_folder:
        return (
            f"{path} must hold a tokenizer that transformers can open (tokenizer.json and "
            f"tokenizer_config.json), and does not: {reason} Save one there with "
            "`tokenizer.save_pretrained`."
        )
    if offline:
        return (
            f"{path!r} is no folder here, is not in the local cache, and the Hugging Face hub is "
            f"out of reach or busy: {reason} Start again later, or give the folder of a downloaded "
            "model."
        )
    return f"The tokenizer of {path} could not be opened: {reason}"


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokenizer inside a fast tokenizer.

    Raises:
        ConfigError: It is a slow one, which has neither offsets nor a serialisation.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"The tokenizer must be a fast one (it has a tokenizer.json); {tokenizer.name_or_path} "
            f"is a {type(tokenizer).__name__}. Convert it once, and save it with the model."
        )
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer that neither truncates nor pads."""
    backend = Tokenizer.from_str(backend_of(tokenizer).to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def from_gguf(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a GGUF file, with settings that transformers' reader drops.

    A file whose pre-tokenizer is `smollm` splits digits one by one before anything else; the
    reader builds GPT-2's, and every number of the text is tokenised differently.

    Raises:
        ConfigError: It is no GGUF file, or one whose tokenizer transformers cannot build.
    """
    try:
        reader = GGUFReader(path)
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"{path} must be a GGUF file with a tokenizer that transformers can build: {error} "
            "Give the model's Hugging Face folder instead."
        ) from error
    backend = backend_of(tokenizer)
    if text_field(reader, "tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    context = reader.get_field(f"{text_field(reader, 'general.architecture')}.context_length")
    if context is not None:
        tokenizer.model_max_length = int(context.contents())
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def text_field(reader: GGUFReader, name: str) -> str:
    """A string of a GGUF file's header; empty when it is not there."""
    field = reader.get_field(name)
    return "" if field is None else str(field.contents())
