"""The teacher's most probable tokens, and the mass of all others at each temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, MinLen
from jaxtyping import Int

from limbeck.errors import ConfigError
from limbeck.signals import DenseLogits, LazyLogits, TeacherDistribution, TopK
from limbeck.store import id_sets, levels
from limbeck.store.forms import Form, forms, logits_in_chunks
from limbeck.store.planes import Unpacker, pack
from limbeck.store.ranks import Ranks


@forms.register("top_k")
class TopKForm(Form):
    """The k most probable tokens, and the mass of the rest at each temperature asked for.

    A log-probability is off by at most 0.5 nat, and its square root by 0.0023 before the k tokens
    are scaled to the mass that the tail leaves; a tail's square root by 1e-5.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        k: Annotated[int, Ge(1)] = 32,
        temperatures: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = (1.0,),
    ) -> None:
        """
        Args:
            vocabulary_size: Tokens the teacher's distributions are over.
            k: Tokens kept of each position.
            temperatures: Those a divergence may be computed at; the first is the one the k
                log-probabilities are kept at, each costs 2 bytes a token.

        Raises:
            ConfigError: No token is left for the tail, or a temperature is named twice.
        """
        if k >= vocabulary_size:
            raise ConfigError(
                f"form.k must be less than the teacher's {vocabulary_size:,} tokens, got {k}. "
                "Keep fewer, or record hidden states."
            )
        if len(set(temperatures)) < len(temperatures):
            raise ConfigError(
                f"form.temperatures must be different, got {list(temperatures)}. Name each once."
            )
        self._vocabulary_size = vocabulary_size
        self._k = k
        self._temperatures = tuple(float(each) for each in temperatures)

    def read_teacher(
        self, distribution: DenseLogits | LazyLogits, generator: torch.Generator
    ) -> TopK:
        del generator
        first, *further = self._temperatures
        parts = [
            TopK.from_logits(logits, self._k, first, further)
            for logits in logits_in_chunks(distribution)
        ]
        return self.join(parts)

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        assert isinstance(signal, TopK)
        return signal.ids.cpu().numpy().reshape(-1)

    def encode(self, signal: TeacherDistribution, ranks: Ranks) -> bytes:
        assert isinstance(signal, TopK)
        sorted_ranks, order = id_sets.sort_by_rank(signal.ids.cpu().numpy(), ranks)
        logprobs = np.take_along_axis(signal.logprobs.float().cpu().numpy(), order, -1)
        gaps = id_sets.to_gaps(sorted_ranks).reshape(-1)
        tails = [signal.tail_logprob, *(signal.further_tails[t] for t in self._temperatures[1:])]
        return pack(
            [
                *id_sets.to_planes(gaps, self._vocabulary_size),
                levels.to_levels(logprobs).reshape(-1),
                *(levels.to_mass(tail.float().cpu().numpy()) for tail in tails),
            ]
        )

    def decode(self, coded: memoryview, num_scored: int, ranks: Ranks) -> TopK:
        unpack = Unpacker(coded)
        ids = id_sets.read_rows(unpack, num_scored, self._k, ranks)
        known = levels.from_levels(unpack.next(num_scored * self._k))
        tails = [levels.read_masses(unpack, num_scored) for _ in self._temperatures]
        unpack.finish()
        known = levels.beside_tail(known.reshape(num_scored, self._k), tails[0])
        first, *further = (torch.from_numpy(tail) for tail in tails)
        named = dict(zip(self._temperatures[1:], further, strict=True))
        return TopK(
            torch.from_numpy(ids), torch.from_numpy(known), first, self._temperatures[0], named
        )

    def join(self, signals: Sequence[TeacherDistribution]) -> TopK:
        parts = [signal for signal in signals if isinstance(signal, TopK)]
        assert len(parts) == len(signals)
        further = {
            each: torch.cat([part.further_tails[each] for part in parts])
            for each in self._temperatures[1:]
        }
        return TopK(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.tail_logprob for part in parts]),
            self._temperatures[0],
            further,
        )
