"""What a store holds one record of: a window of text, found by its content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Int32


@dataclass(frozen=True)
class Sample:
    """A stretch of one document, read from position 0, that sees nothing else.

    Attributes:
        tokens: L + 1 token ids; position t reads token t and predicts token t + 1.
        scored: Which of the L positions count; N of them.
    """

    tokens: Int32[np.ndarray, " L1"]
    scored: Bool[np.ndarray, " L"]

    @property
    def key(self) -> bytes:
        """What it is found by; 16 bytes."""
        return sample_key(self.tokens, self.scored)

    @property
    def num_scored(self) -> int:
        """N."""
        return int(self.scored.sum())


def sample_key(tokens: Int32[np.ndarray, " L1"], scored: Bool[np.ndarray, " L"]) -> bytes:
    """128-bit xxh3 of the tokens and of which positions are scored.

    No defence against intent: two samples made to collide can be found.

    Example:
        >>> sample_key(np.array([3, 1, 4], np.int32), np.array([True, False])).hex()
        '9c184516f66b381e49452721372b1ef6'
    """
    assert len(tokens) == len(scored) + 1
    told = xxhash.xxh3_128(tokens.astype("<i4").tobytes())
    told.update(scored.astype(np.uint8).tobytes())
    return told.digest()


def generator_of(seed: int, key: bytes) -> torch.Generator:
    """Random numbers of one sample: the same however a recording is cut, killed or resumed."""
    mixed = xxhash.xxh3_64_intdigest(key, seed=seed & (2**64 - 1))
    return torch.Generator().manual_seed(mixed >> 1)
