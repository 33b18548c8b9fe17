"""A teacher's signal for a batch, and what an objective needs of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import DataError
from limbeck.losses.distributions.base import TeacherDistribution


class Projections(NamedTuple):
    """Outputs of a block's query, key and value projections, before norms and rotation.

    Heads are concatenated. Grouped-query attention has fewer keys and values than queries.
    """

    query: Float[Tensor, "N Q"]
    key: Float[Tensor, "N K"]
    value: Float[Tensor, "N K"]


@dataclass(frozen=True)
class SignalPart:
    """One distribution at a subset of the N scored positions.

    Attributes:
        positions: Index of each row of `distribution` among the N; None is all N, in order.
        distribution: Held in one form, as one head call or one comparison handles it.
    """

    positions: Int[Tensor, " n"] | None
    distribution: TeacherDistribution


class ChunkLikelihoods(NamedTuple):
    """A teacher's log-likelihood of chunks of text, each of which is one or more student tokens.

    Attributes:
        chunk_of: Chunk of the target of each scored position; C where it is in none.
        logprobs: Of each of the C chunks, given the text before it, nats.
    """

    chunk_of: Int[Tensor, " N"]
    logprobs: Float[Tensor, " C"]


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's signal for one batch.

    Attributes:
        parts: Next-token distributions. No position may be in two parts; a position in no part
            is trained on the text only: terms that read a distribution are 0 there.
        layer_hidden: Block outputs at the N scored positions, by 0-based teacher layer.
        layer_projections: Queries, keys and values there, by 0-based teacher layer.
        likelihoods: Of the batch's own text, by chunk.
    """

    parts: tuple[SignalPart, ...] = ()
    layer_hidden: Mapping[int, Float[Tensor, "N D"]] = field(default_factory=dict)
    layer_projections: Mapping[int, Projections] = field(default_factory=dict)
    likelihoods: ChunkLikelihoods | None = None

    def __post_init__(self) -> None:
        whole = any(part.positions is None for part in self.parts)
        assert not whole or len(self.parts) == 1, "a part with all positions must be the only one"

    @classmethod
    def from_distribution(
        cls,
        distribution: TeacherDistribution | None,
        layer_hidden: Mapping[int, Float[Tensor, "N D"]] | None = None,
        layer_projections: Mapping[int, Projections] | None = None,
    ) -> TeacherSignal:
        """A signal with one distribution for all N positions, or with none."""
        parts = () if distribution is None else (SignalPart(None, distribution),)
        return cls(parts, layer_hidden or {}, layer_projections or {})

    @property
    def distribution(self) -> TeacherDistribution | None:
        """The distribution of all N positions; None without parts."""
        if not self.parts:
            return None
        if len(self.parts) > 1 or self.parts[0].positions is not None:
            raise DataError(
                f"This needs one distribution for all scored positions, and the teacher gave "
                f"{len(self.parts)} parts. Use a teacher that covers every position in one form."
            )
        return self.parts[0].distribution

    def select(self, chosen: Int[Tensor, " n"], num_positions: int) -> TeacherSignal:
        """The parts at `chosen`, whose order becomes that of the positions; no layers.

        With more than one part this waits for the device: how many of a part's positions are
        chosen is not known on the host.
        """
        index = chosen.new_full((num_positions,), -1)
        index[chosen] = torch.arange(len(chosen), device=chosen.device)
        parts = []
        for part in self.parts:
            if part.positions is None:
                parts.append(SignalPart(None, part.distribution.rows(chosen)))
            else:
                positions = index[part.positions]
                kept = (positions >= 0).nonzero().squeeze(-1)
                parts.append(SignalPart(positions[kept], part.distribution.rows(kept)))
        return TeacherSignal(tuple(parts))

    def uncovered(self, num_positions: int, device: torch.device) -> Int[Tensor, " n"]:
        """Positions in no part, increasing; their number is computed on the host."""
        if any(part.positions is None for part in self.parts):
            return torch.empty(0, dtype=torch.long, device=device)
        covered = torch.zeros(num_positions, dtype=torch.uint8, device=device)
        count = num_positions
        for part in self.parts:
            assert part.positions is not None
            covered[part.positions] = 1
            count -= len(part.positions)
        assert count >= 0, "the parts of a teacher's signal overlap"
        return covered.argsort(stable=True)[:count]


@dataclass(frozen=True)
class SignalNeeds:
    """What an objective needs of its teacher's signals; fixed before the first step.

    Attributes:
        distribution: Whether next-token distributions are read.
        layers: 0-based teacher layers whose block outputs are read.
        projections: 0-based teacher layers whose queries, keys and values are read.
        likelihoods: Whether likelihoods of the text by chunk are read.
    """

    distribution: bool = False
    layers: frozenset[int] = frozenset()
    projections: frozenset[int] = frozenset()
    likelihoods: bool = False

    def __or__(self, other: SignalNeeds) -> SignalNeeds:
        return SignalNeeds(
            self.distribution or other.distribution,
            self.layers | other.layers,
            self.projections | other.projections,
            self.likelihoods or other.likelihoods,
        )
