"""Store forms: how a teacher's distributions are reduced and encoded; one form a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import ConfigError, NonFiniteError
from limbeck.losses import Head
from limbeck.losses.distributions import DenseLogits, LazyLogits, TeacherDistribution
from limbeck.registry import Component, Registry
from limbeck.store.token_ranks import TokenRanks

CHUNK_BYTES = 64 << 20
"""Size of the float32 logits that exist at once while a teacher is read."""


class Form(ABC):
    """Which statistics of each distribution are kept, and how they are encoded.

    The first argument is the size of the vocabulary; options are keyword-only.
    """

    needs_head: ClassVar[bool] = False
    """Whether the store needs the teacher's head."""

    @abstractmethod
    def read_teacher(
        self, distribution: TeacherDistribution, generator: torch.Generator
    ) -> TeacherDistribution:
        """The reduced distributions at the N scored positions of one sample; N may be 0.

        Args:
            distribution: The teacher's, over the vocabulary without its padding.
            generator: The sample's generator, on the CPU.

        Raises:
            ConfigError: The form cannot be made of what the teacher gives.
        """

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        """Token ids to count for the ranking by frequency; empty if the form stores no ids."""
        del signal
        return np.empty(0, dtype=np.int64)

    @abstractmethod
    def encode(self, signal: TeacherDistribution, ranks: TokenRanks) -> bytes:
        """The result of `read_teacher`, as bytes."""

    @abstractmethod
    def decode(self, coded: memoryview, num_scored: int, ranks: TokenRanks) -> TeacherDistribution:
        """The encoded signal, up to the form's stated error.

        Raises:
            DataError: The bytes are not an encoded signal. No more memory is allocated than a
                signal of `num_scored` positions needs.
        """

    def with_head(self, head: Head) -> Form:
        """The same form with the teacher's head, for forms that need one to decode."""
        del head
        return self


forms: Registry[Form] = Registry("store form", package="limbeck.store.forms")


def written_out(form: Component | str) -> dict[str, Any]:
    """A form with all its options as JSON, so that a changed default does not change a store.

    Example:
        >>> written_out("hidden")
        {'precision': 'exact', 'type': 'hidden'}
    """
    spec = {"type": form} if isinstance(form, str) else dict(form)
    forms.names()  # imports them
    options = forms.options(str(spec["type"])).items()
    whole = {name: parameter.default for name, (_, parameter) in options} | spec
    return {k: list(v) if isinstance(v, list | tuple) else v for k, v in whole.items()}


def require_tail(k: int, vocabulary_size: int) -> None:
    """Refuse to keep so many tokens that none is left for the tail."""
    if k >= vocabulary_size:
        raise ConfigError(
            f"form.k must be less than the teacher's {vocabulary_size:,} tokens, got {k}. "
            "Keep fewer, or record hidden states."
        )


def logits_in_chunks(distribution: TeacherDistribution) -> Iterator[Float[Tensor, "n V"]]:
    """The logits in chunks of rows of at most `CHUNK_BYTES`; one empty chunk for no rows.

    Raises:
        ConfigError: The distribution has no logits.
        NonFiniteError: A row has a NaN or plus infinity, or nothing but minus infinity.
    """
    if not isinstance(distribution, DenseLogits | LazyLogits):
        raise ConfigError(
            "record.form: must be top_k for a teacher that gives the most probable tokens only "
            "(a served one); every other form needs its whole distributions. Set "
            "record.form={type: top_k, k: ...}, or record with teacher={type: online, path: ...} "
            "or a server's hidden states (teacher.states)."
        )
    if isinstance(distribution, DenseLogits):
        num_rows, vocabulary_size = distribution.logits.shape
    else:
        num_rows, vocabulary_size = len(distribution.hidden), len(distribution.head.weight)
    rows = max(1, CHUNK_BYTES // (4 * vocabulary_size))
    for start in range(0, max(num_rows, 1), rows):
        part = distribution.rows(slice(start, start + rows))
        logits = part.logits() if isinstance(part, LazyLogits) else part.logits.detach()
        bad = int((~logits.amax(-1).isfinite()).sum()) if len(logits) else 0
        if bad:
            raise NonFiniteError(
                f"A teacher's logits must be finite to be recorded, and those of {bad:,} positions "
                "are not. Record with another teacher.dtype; finished shards are kept."
            )
        yield logits


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator itself, or one on the device that is seeded from it."""
    if device == generator.device:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
