"""Interfaces of an export format: writing a file, and running it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from limbeck.models import CausalLM, PreTrainedTokenizerBase
from limbeck.registry import Registry

Messages = Sequence[Mapping[str, str]]
"""A chat: `role` and `content` of each message."""


@dataclass(frozen=True)
class ExportedFile:
    """A student in another format.

    Attributes:
        max_positions: Longest sequence according to the file.
        normalisation: Unicode form (`NFC`) that the tokenizer applies and the runtime does not;
            None where both do the same.
        weights: Files beside it that hold the weights; none where one file is all.
    """

    path: Path
    max_positions: int
    normalisation: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    weights: tuple[Path, ...] = ()


class RuntimeTokenizer(ABC):
    """What makes the tokens of an exported file: the file itself, or tokenizer files beside it.

    Attributes:
        bos_id: The token that begins a text; None without one.
        eos_id: The token that ends a text; None without one.
    """

    bos_id: int | None
    eos_id: int | None

    @abstractmethod
    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of a text; special tokens in it are recognised.

        Args:
            add_special: Whether to add BOS and EOS as the file specifies.
        """

    @abstractmethod
    def end_ids(self) -> frozenset[int]:
        """All tokens at which a generation stops."""

    @abstractmethod
    def render(self, chats: Sequence[Messages]) -> list[str] | None:
        """Chats by the file's own template, ready for an answer; None if it has no template."""


class Runtime(ABC):
    """An exported file, loaded by the program that will run it."""

    tokenizer: RuntimeTokenizer

    @abstractmethod
    def logits(self, token_ids: Sequence[int]) -> Float[Tensor, "T V"]:
        """Logits at every position of one sequence, on the CPU in float32."""


class Exporter(ABC):
    """Writes students in one format.

    Attributes:
        suffix: End of the file's name, as `-q8_0.gguf` or `.onnx`; says which format it is.
        max_kl: Mean KL to the student above which the file is refused, nats a token.
    """

    suffix: str
    max_kl: float

    @abstractmethod
    def require(self) -> None:
        """Refuse before anything is loaded if a library that the format needs is missing."""

    @abstractmethod
    def require_student(self, student: CausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student that the format cannot hold; its weights are not read."""

    @abstractmethod
    def export(
        self, student: CausalLM, tokenizer: PreTrainedTokenizerBase, path: Path
    ) -> ExportedFile:
        """Write a student.

        Args:
            student: On the CPU in float32; rows beyond its vocabulary are left out.

        Raises:
            ConfigError: The format cannot hold this student.
        """

    @abstractmethod
    def run(self, file: ExportedFile) -> AbstractContextManager[Runtime]:
        """The file in its runtime.

        Raises:
            DataError: The runtime does not load it.
        """


exporters: Registry[Exporter] = Registry("export format", package="limbeck.export")
"""Classes with keyword-only options, each an `Exporter`."""


def fallback_note(fallbacks: Mapping[str, str], width: int) -> tuple[str, ...]:
    """A note about matrices that have another format than requested.

    Args:
        width: A row that is divisible by it has the format.
    """
    if not fallbacks:
        return ()
    listed = ", ".join(f"{count} {what}" for what, count in Counter(fallbacks.values()).items())
    return (
        f"{len(fallbacks)} matrices have rows that are not divisible by the format's block: "
        f"{listed}. Widths divisible by {width} quantise fully.",
    )
