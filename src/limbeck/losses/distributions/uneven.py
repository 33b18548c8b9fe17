"""The teacher's tokens that are not too improbable, as many as there are, and the others' mass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from limbeck.losses.distributions.base import (
    FLOOR,
    LogProbPair,
    TeacherDistribution,
    entropy_of,
    log_softmax,
    padded,
)
from limbeck.losses.distributions.top_k import kept_and_tail


@dataclass(frozen=True)
class UnevenTopK(TeacherDistribution):
    """The most probable tokens, more where more are probable; all others are one outcome.

    As `TopK`, it bounds f-divergences from below. At equal bytes its gradient is nearer the exact
    one, because bytes go to the positions that need them.

    Attributes:
        ids: Token ids of each position, as wide as the widest row; where not `kept`, a row repeats
            its first id, which is always kept.
        logprobs: Their log-probabilities under the *whole* vocabulary at `temperature`.
        kept: Which of them count.
        tail_logprob: Log of the probability of all other tokens.
        temperature: Temperature at which the teacher was read.
        further_tails: The tail's log-probability at other temperatures.
    """

    merges_outcomes = True

    ids: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    kept: Bool[Tensor, "N k"]
    tail_logprob: Float[Tensor, " N"]
    temperature: float = 1.0
    further_tails: Mapping[float, Float[Tensor, " N"]] = field(default_factory=dict)

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "N V"],
        most: int,
        least: float,
        temperature: float = 1.0,
        further: Iterable[float] = (),
    ) -> UnevenTopK:
        """Keep of each row the tokens that are probable enough, and the mass of the rest.

        Args:
            logits: The teacher's.
            most: Tokens kept of a row at most.
            least: Probability a token must have at `temperature`; the most probable one is kept in
                any case.
            temperature: At which log-probabilities are kept.
            further: Other temperatures it shall serve.
        """
        logp = log_softmax(logits, temperature)
        top = logp.topk(most, dim=-1)
        kept = top.values >= math.log(least)
        kept[:, :1] = True
        width = int(kept.sum(-1).max()) if len(kept) else 1
        kept = kept[:, :width]
        ids = torch.where(kept, top.indices[:, :width], top.indices[:, :1])

        def tail(other: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
            return other.scatter(-1, ids, FLOOR).logsumexp(-1)

        tails = {each: tail(log_softmax(logits, each)) for each in further}
        known = top.values[:, :width].masked_fill(~kept, FLOOR)
        return cls(ids, known, kept, tail(logp), temperature, tails)

    @classmethod
    def cat(cls, parts: Sequence[UnevenTopK]) -> UnevenTopK:
        width = max(part.ids.shape[1] for part in parts)
        return super().cat([part._widened(width) for part in parts])

    def _widened(self, width: int) -> UnevenTopK:
        first = self.ids[:, :1].expand(-1, width - self.ids.shape[1])
        return replace(
            self,
            ids=torch.cat([self.ids, first], dim=-1),
            logprobs=padded(self.logprobs, width, FLOOR),
            kept=padded(self.kept, width, False),
        )

    def at(self, temperature: float) -> Float[Tensor, "N k1"]:
        """Log-probabilities of the tokens, `FLOOR` where none is kept, then of the tail.

        Raises:
            ConfigError: The teacher was not read at this temperature.
        """
        tails = {self.temperature: self.tail_logprob, **self.further_tails}
        known = self.logprobs.masked_fill(~self.kept, -torch.inf)
        return kept_and_tail(known, tails, self.temperature, temperature).clamp_min(FLOOR)

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        """Both models on the kept tokens and the rest."""
        teacher = self.at(temperature)
        logp = log_softmax(student_logits, temperature)
        tail = logp.scatter(-1, self.ids, FLOOR).logsumexp(-1, keepdim=True)
        known = logp.gather(-1, self.ids).masked_fill(~self.kept, FLOOR)
        return LogProbPair(torch.cat([known, tail], dim=-1), teacher)

    def entropy(self) -> Float[Tensor, " N"]:
        """Entropy over the kept tokens and the rest, at the temperature of the recording."""
        return entropy_of(self.at(self.temperature))
