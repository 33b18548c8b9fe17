"""The teacher's most probable tokens, and the total probability of all others."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt, MinLen
from jaxtyping import Float32, Int

from limbeck.errors import ConfigError
from limbeck.losses.distributions import (
    FLOOR,
    TeacherDistribution,
    TopK,
    UnevenTopK,
)
from limbeck.store import id_sets, quantization
from limbeck.store.byte_planes import Unpacker, pack, to_planes
from limbeck.store.forms.base import Form, forms, logits_in_chunks, require_tail
from limbeck.store.token_ranks import TokenRanks


@forms.register("top_k")
class TopKForm(Form):
    """The k most probable tokens, or those above a threshold, and the tail at each temperature.

    Errors: at most 0.5 nat for a log-probability; for the square root of a probability 0.0023
    before the k tokens are rescaled to sum to one with the tail, and 0.00014 if its rounded value
    is at least 0.0003 and 50 times `min_prob`; 1e-5 for the square root of the tail.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        k: Annotated[int, Ge(1)] = 32,
        min_prob: Annotated[float, Ge(0), Lt(1)] = 0.0,
        temperatures: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = (1.0,),
    ) -> None:
        """
        Args:
            k: Tokens kept at each position; the maximum with `min_prob`.
            min_prob: Minimum probability of a kept token; the most probable one is always kept. It
                needs about 60 % of the bytes of a fixed k for the same gradient error. (Keeping
                tokens up to a total probability needs more than a fixed k.)
            temperatures: Temperatures the store serves. The k log-probabilities are kept at the
                first; each costs 2 bytes a token for the tail.
        """
        require_tail(k, vocabulary_size)
        if len(set(temperatures)) < len(temperatures):
            raise ConfigError(
                f"form.temperatures must be different, got {list(temperatures)}. Name each once."
            )
        self._vocabulary_size = vocabulary_size
        self._k, self._min_prob = k, min_prob
        self._first_fine_level = quantization.first_fine_level(min_prob) if min_prob > 0 else 256
        self._temperatures = tuple(float(each) for each in temperatures)

    def read_teacher(
        self, distribution: TeacherDistribution, generator: torch.Generator
    ) -> TeacherDistribution:
        del generator
        if isinstance(distribution, TopK):
            return self._fewer(distribution)
        first, *further = self._temperatures
        parts: list[TeacherDistribution] = []
        for logits in logits_in_chunks(distribution):
            if self._min_prob > 0:
                kept = UnevenTopK.from_logits(logits, self._k, self._min_prob, first, further)
                parts.append(kept)
            else:
                parts.append(TopK.from_logits(logits, self._k, first, further))
        return type(parts[0]).cat(parts)

    def _fewer(self, given: TopK) -> TopK | UnevenTopK:
        """The form of a teacher that gives k tokens and the tail.

        Raises:
            ConfigError: It gives too few, or not at the temperatures of the form.
        """
        if (found := given.ids.shape[1]) < self._k:
            raise ConfigError(
                f"record.form.k: must be at most the {found} tokens that the teacher gives, got "
                f"{self._k}. Lower it, or raise teacher.k."
            )
        if self._temperatures != (given.temperature,):
            raise ConfigError(
                f"record.form.temperatures: must be [{given.temperature:g}], the only one at which "
                f"this teacher gives its top k, got {list(self._temperatures)}. Correct it, or "
                "record with teacher={type: online, path: ...}."
            )
        kept = given.fewer(self._k)
        return UnevenTopK.from_top_k(kept, self._min_prob) if self._min_prob > 0 else kept

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        if isinstance(signal, UnevenTopK):
            return signal.ids[signal.kept].cpu().numpy()
        assert isinstance(signal, TopK)
        return signal.ids.cpu().numpy().reshape(-1)

    def encode(self, signal: TeacherDistribution, ranks: TokenRanks) -> bytes:
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
        tail_planes = [quantization.encode_probs(tail.float().cpu().numpy()) for tail in tails]
        rounded = quantization.to_levels(known)
        fine = rounded >= self._first_fine_level
        parts = (
            [quantization.to_sixteenths(known[fine], rounded[fine])] if self._min_prob > 0 else []
        )
        return pack([*planes, rounded, *parts, *tail_planes])

    def decode(self, coded: memoryview, num_scored: int, ranks: TokenRanks) -> TopK | UnevenTopK:
        unpack = Unpacker(coded)
        if self._min_prob > 0:
            ids, kept = id_sets.read_uneven(unpack, num_scored, ranks, self._k)
        else:
            ids = id_sets.read_rows(unpack, num_scored, self._k, ranks)
            kept = np.ones(ids.shape, dtype=np.bool_)
        known = np.full(ids.shape, FLOOR, dtype=np.float32)
        known[kept] = self._read_known(unpack, int(kept.sum()))
        tails = [quantization.read_probs(unpack, num_scored) for _ in self._temperatures]
        unpack.finish()
        known = quantization.rescale_to_tail(known, tails[0])
        first, *further = (torch.from_numpy(tail) for tail in tails)
        named = dict(zip(self._temperatures[1:], further, strict=True))
        token_ids, logprobs = torch.from_numpy(ids), torch.from_numpy(known)
        if self._min_prob > 0:
            mask = torch.from_numpy(kept)
            return UnevenTopK(token_ids, logprobs, mask, first, self._temperatures[0], named)
        return TopK(token_ids, logprobs, first, self._temperatures[0], named)

    def _read_known(self, unpack: Unpacker, entries: int) -> Float32[np.ndarray, " entries"]:
        """Log-probabilities of the kept tokens, of which there are `entries`."""
        rounded = unpack.next(entries)
        known = quantization.from_levels(rounded)
        if self._min_prob > 0:
            fine = rounded >= self._first_fine_level
            packed = unpack.next(-(-int(fine.sum()) // 2))
            known[fine] = quantization.from_sixteenths(rounded[fine], packed)
        return known
