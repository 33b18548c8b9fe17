"""The teacher's most probable tokens, and samples of all others: unbiased."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Int

from limbeck.losses.distributions import TeacherDistribution, TopKSamples
from limbeck.store import id_sets, quantization
from limbeck.store.byte_planes import Unpacker, pack, to_planes
from limbeck.store.counts import (
    decode_counts,
    decode_entropy,
    encode_counts,
    encode_entropy,
)
from limbeck.store.forms.base import Form, forms, generator_on, logits_in_chunks, require_tail
from limbeck.store.token_ranks import TokenRanks


@forms.register("top_k_samples")
class TopKSamplesForm(Form):
    """The k most probable tokens, samples of the tail, and the entropy; serves forward KL.

    Errors: at most 1e-5 for the square root of a kept probability, before the k tokens are rescaled
    to sum to one with the tail (one byte is too coarse: rounding, unlike sampling, does not average
    out); 0.00013 nats for the entropy.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        k: Annotated[int, Ge(1)] = 16,
        num_draws: Annotated[int, Ge(1), Le(65535)] = 8,
        temperature: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        """
        Args:
            k: Most probable tokens kept at each position.
            num_draws: Systematic draws from the tail at each position.
            temperature: Temperature of the distribution; the store serves no other.
        """
        require_tail(k, vocabulary_size)
        self._vocabulary_size = vocabulary_size
        self._k, self._num_draws = k, num_draws
        self._temperature = float(temperature)

    def read_teacher(
        self, distribution: TeacherDistribution, generator: torch.Generator
    ) -> TopKSamples:
        parts = [
            TopKSamples.from_logits(
                logits,
                self._k,
                self._num_draws,
                self._temperature,
                generator=generator_on(logits.device, generator),
            )
            for logits in logits_in_chunks(distribution)
        ]
        return TopKSamples.cat(parts)

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        assert isinstance(signal, TopKSamples)
        drawn = signal.drawn_ids[signal.counts > 0].cpu().numpy()
        return np.concatenate([signal.ids.cpu().numpy().reshape(-1), drawn])

    def encode(self, signal: TeacherDistribution, ranks: TokenRanks) -> bytes:
        assert isinstance(signal, TopKSamples)
        sorted_ranks, order = id_sets.sort_by_rank(signal.ids.cpu().numpy(), ranks)
        logprobs = np.take_along_axis(signal.logprobs.float().cpu().numpy(), order, -1)
        gaps = id_sets.to_gaps(sorted_ranks).reshape(-1)
        return pack(
            [
                *to_planes(gaps, self._vocabulary_size),
                quantization.encode_probs(logprobs.reshape(-1)),
                quantization.encode_probs(signal.tail_logprob.float().cpu().numpy()),
                *encode_counts(signal.drawn_ids, signal.counts, ranks, self._num_draws),
                *encode_entropy(signal.entropy_nats),
            ]
        )

    def decode(self, coded: memoryview, num_scored: int, ranks: TokenRanks) -> TopKSamples:
        unpack = Unpacker(coded)
        ids = id_sets.read_rows(unpack, num_scored, self._k, ranks)
        known = quantization.read_probs(unpack, num_scored * self._k).reshape(num_scored, self._k)
        tail = quantization.read_probs(unpack, num_scored)
        known = quantization.rescale_to_tail(known, tail)
        drawn_ids, counts = decode_counts(unpack, num_scored, ranks, self._num_draws)
        entropy = decode_entropy(unpack, num_scored)
        unpack.finish()
        return TopKSamples(
            torch.from_numpy(ids),
            torch.from_numpy(known),
            torch.from_numpy(tail),
            drawn_ids,
            counts,
            self._num_draws,
            entropy,
            self._temperature,
        )
