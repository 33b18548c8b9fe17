"""Tokens drawn from the teacher: few bytes, and no bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Int, Int64
from torch import Tensor

from limbeck.errors import DataError
from limbeck.signals import DenseLogits, LazyLogits, Samples, TeacherDistribution
from limbeck.store import id_sets
from limbeck.store.forms import Form, forms, logits_in_chunks
from limbeck.store.planes import Unpacker, pack
from limbeck.store.ranks import Ranks

ENTROPY_STEPS = 4096
"""Steps a nat of the stored entropy, which is off by at most 1 / 8192 and ends at 16 nats."""


@forms.register("samples")
class SamplesForm(Form):
    """Tokens drawn from the teacher at one temperature, and its entropy; serves forward KL.

    The draws are exact; the entropy is off by at most 0.00013 nats.
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
            vocabulary_size: Tokens the teacher's distributions are over.
            num_draws: Of each position.
            temperature: Of the distribution drawn from; no other can be served.
            draw: `systematic` takes evenly spaced points with one random offset, `multinomial`
                independent ones, which have several times its variance.
        """
        self._vocabulary_size = vocabulary_size
        self._num_draws = num_draws
        self._temperature = float(temperature)
        self._systematic = draw == "systematic"

    def read_teacher(
        self, distribution: DenseLogits | LazyLogits, generator: torch.Generator
    ) -> Samples:
        parts = []
        for logits in logits_in_chunks(distribution):
            source = generator
            if logits.device != generator.device:
                source = torch.Generator(logits.device)
                source.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            parts.append(
                Samples.from_logits(
                    logits,
                    self._num_draws,
                    self._temperature,
                    systematic=self._systematic,
                    generator=source,
                )
            )
        return self.join(parts)

    def ids_of(self, signal: TeacherDistribution) -> Int[np.ndarray, " ids"]:
        assert isinstance(signal, Samples)
        return signal.ids[signal.counts > 0].cpu().numpy()

    def encode(self, signal: TeacherDistribution, ranks: Ranks) -> bytes:
        assert isinstance(signal, Samples)
        entropies = np.rint(signal.entropy_nats.double().cpu().numpy() * ENTROPY_STEPS)
        return pack(
            [
                *encode_counts(signal.ids, signal.counts, ranks, self._num_draws),
                *two_bytes(entropies.clip(0, 65535).astype(np.int64)),
            ]
        )

    def decode(self, coded: memoryview, num_scored: int, ranks: Ranks) -> Samples:
        unpack = Unpacker(coded)
        ids, counts = decode_counts(unpack, num_scored, ranks, self._num_draws)
        entropies = id_sets.from_planes([unpack.next(num_scored) for _ in range(2)])
        unpack.finish()
        return Samples(
            ids,
            counts,
            self._num_draws,
            torch.from_numpy((entropies / ENTROPY_STEPS).astype(np.float32)),
            self._temperature,
        )

    def join(self, signals: Sequence[TeacherDistribution]) -> Samples:
        parts = [signal for signal in signals if isinstance(signal, Samples)]
        assert len(parts) == len(signals)
        return Samples(
            widened([part.ids for part in parts]),
            widened([part.counts for part in parts]),
            self._num_draws,
            torch.cat([part.entropy_nats for part in parts]),
            self._temperature,
        )


def widened(parts: Sequence[Int[Tensor, "_ _"]]) -> Int[Tensor, "N k"]:
    """Rows of all parts, filled with 0 up to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def two_bytes(numbers: Int64[np.ndarray, " n"]) -> list[np.ndarray]:
    """Low and high bytes of numbers below 65,536."""
    return id_sets.to_planes(numbers, 1 << 16)


def encode_counts(
    ids: Int[Tensor, "N k"], counts: Int[Tensor, "N k"], ranks: Ranks, num_draws: int
) -> list[np.ndarray]:
    """Planes of drawn tokens: how many differ in each row, their ranks' gaps, their counts."""
    of_ids = ranks.of_ids[ids.cpu().numpy()].astype(np.int64)
    there = counts.cpu().numpy() > 0
    order = np.argsort(np.where(there, of_ids, ranks.vocabulary_size), axis=-1)
    of_ids = np.take_along_axis(of_ids, order, -1)
    sorted_counts = np.take_along_axis(counts.cpu().numpy(), order, -1)
    there = sorted_counts > 0
    gaps = id_sets.to_gaps(of_ids)[there]
    return [
        *id_sets.to_planes(there.sum(-1).astype(np.int64) - 1, num_draws),
        *id_sets.to_planes(gaps, ranks.vocabulary_size),
        *id_sets.to_planes(sorted_counts[there].astype(np.int64) - 1, num_draws),
    ]


def decode_counts(
    unpack: Unpacker, num_scored: int, ranks: Ranks, num_draws: int
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Ids and counts of drawn tokens; a count of 0 fills up short rows.

    Raises:
        DataError: The counts of a row do not add up, or an id is none of the vocabulary's.
    """
    narrow = range(id_sets.num_bytes(num_draws))
    different = id_sets.from_planes([unpack.next(num_scored) for _ in narrow]) + 1
    if num_scored and int(different.max()) > num_draws:
        raise DataError(f"A position has more different tokens than its {num_draws} draws.")
    entries, width = int(different.sum()), int(different.max(initial=0))
    wide = range(id_sets.num_bytes(ranks.vocabulary_size))
    gaps = id_sets.from_planes([unpack.next(entries) for _ in wide])
    drawn = id_sets.from_planes([unpack.next(entries) for _ in narrow]) + 1
    there = np.arange(width) < different[:, None]
    padded_gaps = np.zeros((num_scored, width), dtype=np.int64)
    padded_gaps[there] = gaps
    counts = np.zeros((num_scored, width), dtype=np.int64)
    counts[there] = drawn
    if not bool((counts.sum(-1) == num_draws).all()):
        raise DataError(f"The counts of a position do not add up to its {num_draws} draws.")
    sorted_ranks = (padded_gaps + 1).cumsum(-1) - 1
    ids = id_sets.ids_at(np.where(there, sorted_ranks, 0), ranks)
    return torch.from_numpy(ids), torch.from_numpy(counts)
