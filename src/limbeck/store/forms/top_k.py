"""The teacher's most probable tokens, and the mass of all others at each temperature."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt, MinLen
from jaxtyping import Float32, Int

from limbeck.errors import ConfigError
from limbeck.losses.distributions import (
    FLOOR,
    DenseLogits,
    LazyLogits,
    TeacherDistribution,
    TopK,
    UnevenTopK,
)
from limbeck.store import id_sets, levels
from limbeck.store.forms.base import Form, forms, logits_in_chunks
from limbeck.store.planes import Unpacker, pack, to_planes
from limbeck.store.ranks import Ranks


@forms.register("top_k")
class TopKForm(Form):
    """The k most probable tokens, or those probable enough, and the others' mass a temperature.

    A log-probability is off by at most 0.5 nat, and the square root of a probability by 0.0023
    before the k tokens are scaled to the mass that the tail leaves, by 0.00014 where what it is
    rounded to is at least 50 times `least` and 0.0003; a tail's square root by 1e-5.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        k: Annotated[int, Ge(1)] = 32,
        least: Annotated[float, Ge(0), Lt(1)] = 0.0,
        temperatures: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = (1.0,),
    ) -> None:
        """
        Args:
            vocabulary_size: Tokens the teacher's distributions are over.
            k: Tokens kept of each position; with `least`, at most so many.
            least: Probability that a token needs to be kept, but for the most probable one. Bytes
                then go to the positions that need them: about 60 per cent of what a fixed k takes
                for the same gradient. Keeping tokens up to a mass does worse than a fixed k.
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
        self._k, self._least = k, least
        self._first_fine = levels.first_fine(least) if least > 0 else 256
        self._temperatures = tuple(float(each) for each in temperatures)

    def read_teacher(
        self, distribution: DenseLogits | LazyLogits, generator: torch.Generator
    ) -> TeacherDistribution:
        del generator
        first, *further = self._temperatures
        parts: list[TeacherDistribution] = []
        for logits in logits_in_chunks(distribution):
            if self._least > 0:
                kept = UnevenTopK.from_logits(logits, self._k, self._least, first, further)
                parts.append(kept)
            else:
                parts.append(TopK.from_logits(logits, self._k, first, further))
        return type(parts[0]).cat(parts)

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        if isinstance(signal, UnevenTopK):
            return signal.ids[signal.kept].cpu().numpy()
        assert isinstance(signal, TopK)
        return signal.ids.cpu().numpy().reshape(-1)

    def encode(self, signal: TeacherDistribution, ranks: Ranks) -> bytes:
        assert isinstance(signal, TopK | UnevenTopK)
        ids, logprobs = signal.ids.cpu().numpy(), signal.logprobs.float().cpu().numpy()
        if isinstance(signal, UnevenTopK):
            kept = signal.kept.cpu().numpy()
            planes, order = id_sets.write_uneven(ids, kept, ranks, self._k)
            kept, logprobs = (np.take_along_axis(each, order, -1) for each in (kept, logprobs))
            known = logprobs[kept]
        else:
            sorted_ranks, order = id_sets.sort_by_rank(ids, ranks)
            gaps = id_sets.to_gaps(sorted_ranks).reshape(-1)
            planes = to_planes(gaps, self._vocabulary_size)
            known = np.take_along_axis(logprobs, order, -1).reshape(-1)
        tails = [signal.tail_logprob, *(signal.further_tails[t] for t in self._temperatures[1:])]
        masses = [levels.to_mass(tail.float().cpu().numpy()) for tail in tails]
        told = levels.to_levels(known)
        fine = told >= self._first_fine
        parts = [levels.to_parts(known[fine], told[fine])] if self._least > 0 else []
        return pack([*planes, told, *parts, *masses])

    def decode(self, coded: memoryview, num_scored: int, ranks: Ranks) -> TopK | UnevenTopK:
        unpack = Unpacker(coded)
        if self._least > 0:
            ids, kept = id_sets.read_uneven(unpack, num_scored, ranks, self._k)
        else:
            ids = id_sets.read_rows(unpack, num_scored, self._k, ranks)
            kept = np.ones(ids.shape, dtype=np.bool_)
        known = np.full(ids.shape, FLOOR, dtype=np.float32)
        known[kept] = self._read_known(unpack, int(kept.sum()))
        tails = [levels.read_masses(unpack, num_scored) for _ in self._temperatures]
        unpack.finish()
        known = levels.beside_tail(known, tails[0])
        first, *further = (torch.from_numpy(tail) for tail in tails)
        named = dict(zip(self._temperatures[1:], further, strict=True))
        told, logprobs = torch.from_numpy(ids), torch.from_numpy(known)
        if self._least > 0:
            there = torch.from_numpy(kept)
            return UnevenTopK(told, logprobs, there, first, self._temperatures[0], named)
        return TopK(told, logprobs, first, self._temperatures[0], named)

    def _read_known(self, unpack: Unpacker, entries: int) -> Float32[np.ndarray, " entries"]:
        """Log-probabilities of so many kept tokens."""
        told = unpack.next(entries)
        known = levels.from_levels(told)
        if self._least > 0:
            fine = told >= self._first_fine
            known[fine] = levels.from_parts(told[fine], unpack.next(-(-int(fine.sum()) // 2)))
        return known
