"""What ONNX and ExecuTorch exports share: a student as transformers' exporters trace it.

Such a file computes logits of token ids and nothing else. Tokenizer, chat template and generation
settings are files beside it, as transformers writes them, and are read back for the comparison.
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.errors import ConfigError, DataError, extra_needed
from limbeck.export.base import Messages, Runtime, RuntimeTokenizer
from limbeck.export.parity import rendered
from limbeck.models import CausalLM
from limbeck.models.attention import SEGMENTS
from limbeck.models.build import hollow
from limbeck.models.quiet import quiet
from limbeck.models.save import generation_settings, plain_weights
from limbeck.models.source import first_line
from limbeck.tokenizers import backend_of, load_tokenizer


def require_packages(what: str, packages: Sequence[str], extra: str) -> None:
    """Refuse an export whose packages are not installed."""
    for name in packages:
        with extra_needed(f"{what} export", name, extra), silenced():
            importlib.import_module(name)


def require_length(student: CausalLM) -> int:
    """The longest sequence a student was made for."""
    if student.max_positions is None:
        raise ConfigError(
            "A student's configuration must state its longest sequence, which bounds the lengths "
            f"of the exported file, and that of this {student.family} model does not. Add "
            "max_position_embeddings to its config.json."
        )
    return student.max_positions


def plain_model(student: CausalLM) -> PreTrainedModel:
    """A student as an ordinary model that shares its weights.

    Adapters are merged, rows of the head that stand for no token are cut, and attention is
    transformers' own.
    """
    config = copy.deepcopy(student.config)
    config.vocab_size = student.vocabulary_size
    model = hollow(config, torch.float32)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {
        name: tensor if tensor.shape == shapes[name] else tensor[: student.vocabulary_size]
        for name, tensor in plain_weights(student).items()
    }
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if config._attn_implementation == SEGMENTS:
        model.set_attn_implementation("sdpa")
    model.generation_config = generation_settings(student.hf_model.generation_config)
    model.requires_grad_(False)
    model.train(False)
    return model


def write_traced(
    name: str,
    student: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    inputs: dict[str, Tensor],
    export: Callable[[PreTrainedModel, dict[str, Any]], Any],
    clean: Callable[[Any], None] = lambda _program: None,
) -> None:
    """Write what one of transformers' exporters makes of a student, and what belongs to it.

    Args:
        inputs: An example.
        export: The exporter's, with its configuration.
        clean: Changes the traced program before it is written.

    Raises:
        ConfigError: The exporter cannot do this student.
    """
    library: Any = importlib.import_module("transformers.exporters")
    model = plain_model(student)
    try:
        with silenced():
            exported = export(model, {**inputs, "use_cache": False})
    except Exception as error:  # torch.export and the converters raise errors of any kind
        raise ConfigError(
            f"transformers' {name} exporter must trace this {student.family} student, and cannot: "
            f"{type(error).__name__}: {first_line(error)} Choose another format or another family."
        ) from error
    clean(exported.program)
    (component,) = exported.components.values()
    library.ExportedModel({path.stem: component}, name.lower(), model.config).save_pretrained(
        path.parent
    )
    tokenizer.save_pretrained(path.parent)
    assert model.generation_config is not None, "plain_model gives it one"
    model.generation_config.save_pretrained(path.parent)


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress what exporters print, log and warn about while they work.

    That is progress on stdout (where `--json` writes), that versions are newer than those tested,
    optional packages, and deprecated calls in PyTorch's own code. The file is judged by parity.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), quiet():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


class FolderTokenizer(RuntimeTokenizer):
    """Tokenizer files and generation settings of a folder, read back."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(str(folder))
        self._settings = GenerationConfig.from_pretrained(folder)
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        ids: list[int] = (
            backend_of(self._tokenizer).encode(text, add_special_tokens=add_special).ids
        )
        return ids

    def end_ids(self) -> frozenset[int]:
        """Tokens at which `generate` stops with these settings."""
        ends = self._settings.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def render(self, chats: Sequence[Messages]) -> list[str] | None:
        if self._tokenizer.chat_template is None:
            return None
        return [rendered(self._tokenizer, [dict(m) for m in chat]) or "" for chat in chats]


class FolderRuntime(Runtime):
    """A loaded file or folder, with tokenizer files beside it."""

    def __init__(
        self, name: str, path: Path, load: Callable[[], Callable[[list[int]], Tensor]]
    ) -> None:
        """
        Args:
            load: Gives a function from token ids to logits.

        Raises:
            DataError: The runtime does not load the file.
        """
        self._name, self._path = name, path
        try:
            self._logits = load()
        except Exception as error:  # the runtimes' errors have no common class
            raise DataError(
                f"{name} must load {path.name}, and refuses it: {first_line(error)}"
            ) from error
        self.tokenizer = FolderTokenizer(path.parent)

    def logits(self, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
        try:
            return self._logits(list(token_ids))
        except Exception as error:
            raise DataError(
                f"{self._name} must read {len(token_ids):,} positions with {self._path.name}, and "
                f"fails: {first_line(error)}"
            ) from error
