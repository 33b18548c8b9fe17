"""A sample: a window of text with its scored positions, identified by a hash of its content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Int32


@dataclass(frozen=True)
class Sample:
    """A contiguous window of one document, with position ids from 0 and no other context.

    Attributes:
        tokens: L + 1 token ids; position t reads token t and predicts token t + 1.
        scored: Which of the L positions are scored; N of them.
    """

    tokens: Int32[np.ndarray, " L1"]
    scored: Bool[np.ndarray, " L"]

    @property
    def key(self) -> bytes:
        """Its 16-byte key in a store."""
        return sample_key(self.tokens, self.scored)

    @property
    def num_scored(self) -> int:
        """N, the number of scored positions."""
        return int(self.scored.sum())


def sample_key(tokens: Int32[np.ndarray, " L1"], scored: Bool[np.ndarray, " L"]) -> bytes:
    """128-bit xxh3 hash of the tokens and of the scored mask; not cryptographic.

    Example:
        >>> sample_key(np.array([3, 1, 4], np.int32), np.array([True, False])).hex()
        '9c184516f66b381e49452721372b1ef6'
    """
    assert len(tokens) == len(scored) + 1
    digest = xxhash.xxh3_128(tokens.astype("<i4").tobytes())
    digest.update(scored.astype(np.uint8).tobytes())
    return digest.digest()


def generator_of(seed: int, key: bytes) -> torch.Generator:
    """A generator that depends on seed and sample only, not on how a recording was split."""
    mixed = xxhash.xxh3_64_intdigest(key, seed=seed & (2**64 - 1))
    return torch.Generator().manual_seed(mixed >> 1)
