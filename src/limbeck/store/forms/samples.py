"""Tokens sampled from the teacher: few bytes, and unbiased."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Int

from limbeck.losses.distributions import Samples, TeacherDistribution
from limbeck.store.byte_planes import Unpacker, pack
from limbeck.store.counts import (
    decode_counts,
    decode_entropy,
    encode_counts,
    encode_entropy,
)
from limbeck.store.forms.base import Form, forms, generator_on, logits_in_chunks
from limbeck.store.token_ranks import TokenRanks


@forms.register("samples")
class SamplesForm(Form):
    """Tokens sampled at one temperature, and the entropy; serves forward KL at it.

    Ids and counts are exact; the error of the entropy is at most 0.00013 nats.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        num_draws: Annotated[int, Ge(1), Le(65535)] = 50,
        temperature: Annotated[float, Gt(0)] = 1.0,
        draw: Literal["systematic", "multinomial"] = "systematic",
    ) -> None:
        """
        Args:
            num_draws: Draws at each position.
            temperature: Temperature of the distribution; the store serves no other.
            draw: `systematic` takes evenly spaced points with one random offset, `multinomial`
                independent ones, which have several times its variance.
        """
        self._vocabulary_size = vocabulary_size
        self._num_draws = num_draws
        self._temperature = float(temperature)
        self._systematic = draw == "systematic"

    def read_teacher(
        self, distribution: TeacherDistribution, generator: torch.Generator
    ) -> Samples:
        parts = [
            Samples.from_logits(
                logits,
                self._num_draws,
                self._temperature,
                systematic=self._systematic,
                generator=generator_on(logits.device, generator),
            )
            for logits in logits_in_chunks(distribution)
        ]
        return Samples.cat(parts)

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        assert isinstance(signal, Samples)
        return signal.ids[signal.counts > 0].cpu().numpy()

    def encode(self, signal: TeacherDistribution, ranks: TokenRanks) -> bytes:
        assert isinstance(signal, Samples)
        counted = encode_counts(signal.ids, signal.counts, ranks, self._num_draws)
        return pack([*counted, *encode_entropy(signal.entropy_nats)])

    def decode(self, coded: memoryview, num_scored: int, ranks: TokenRanks) -> Samples:
        unpack = Unpacker(coded)
        ids, counts = decode_counts(unpack, num_scored, ranks, self._num_draws)
        entropy = decode_entropy(unpack, num_scored)
        unpack.finish()
        return Samples(ids, counts, self._num_draws, entropy, self._temperature)
