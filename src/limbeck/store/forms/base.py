"""What a store keeps of a teacher's distributions, one form a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses import Head
from limbeck.losses.distributions import DenseLogits, LazyLogits, TeacherDistribution
from limbeck.registry import Component, Registry
from limbeck.store.ranks import Ranks

CHUNK_BYTES = 64 << 20
"""Of float32 logits that exist at once while a teacher is read."""


class Form(ABC):
    """What is kept of each distribution, and how it is coded.

    A form is made with the size of the vocabulary; its options are keyword-only, as everywhere.
    """

    needs_head: ClassVar[bool] = False
    """Whether the store must hold the teacher's head."""

    @abstractmethod
    def read_teacher(
        self, distribution: DenseLogits | LazyLogits, generator: torch.Generator
    ) -> TeacherDistribution:
        """What is kept of the distribution at the N scored positions of one sample.

        Args:
            distribution: The teacher's, over the vocabulary without its padding.
            generator: Of the sample; on the CPU.
        """

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        """Ids to learn from which are frequent; none where the form codes no ids."""
        del signal
        return np.empty(0, dtype=np.int64)

    @abstractmethod
    def encode(self, signal: TeacherDistribution, ranks: Ranks) -> bytes:
        """What `read_teacher` gave, as bytes."""

    @abstractmethod
    def decode(self, coded: memoryview, num_scored: int, ranks: Ranks) -> TeacherDistribution:
        """What was encoded, up to the form's stated error.

        Raises:
            DataError: The bytes are not what `encode` writes. No more memory is taken than a whole
                signal of `num_scored` positions needs.
        """

    def with_head(self, head: Head) -> Form:
        """The same form, decoding to logits of this head; only where one is needed."""
        del head
        return self


forms: Registry[Form] = Registry("store form", package="limbeck.store.forms")


def written_out(form: Component | str) -> dict[str, Any]:
    """A form with all its options, as JSON keeps it: a store reads the same if a default changes.

    Example:
        >>> written_out("hidden")
        {'precision': 'exact', 'type': 'hidden'}
    """
    told = {"type": form} if isinstance(form, str) else dict(form)
    forms.names()  # finds them
    options = forms.options(str(told["type"])).items()
    whole = {name: parameter.default for name, (_, parameter) in options} | told
    return {k: list(v) if isinstance(v, list | tuple) else v for k, v in whole.items()}


def logits_in_chunks(distribution: DenseLogits | LazyLogits) -> Iterator[Float[Tensor, "n V"]]:
    """Logits of some rows, then of the next, so that few exist at once."""
    if isinstance(distribution, DenseLogits):
        num_rows, vocabulary_size = distribution.logits.shape
    else:
        num_rows, vocabulary_size = len(distribution.hidden), len(distribution.head.weight)
    rows = max(1, CHUNK_BYTES // (4 * vocabulary_size))
    for start in range(0, max(num_rows, 1), rows):  # one empty chunk where there are no rows
        part = distribution.rows(slice(start, start + rows))
        yield part.logits() if isinstance(part, LazyLogits) else part.logits.detach()


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on the device of what is drawn from, whose state follows from a given one."""
    if device == generator.device:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
