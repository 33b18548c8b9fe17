"""The teacher's tokens above a minimum probability, and the tail."""

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
    log_softmax,
    padded,
)
from limbeck.losses.distributions.top_k import KeptTokens, TopK, kept_and_tail, tail_of


@dataclass(frozen=True)
class UnevenTopK(KeptTokens):
    """The tokens above a minimum probability; all others are merged into one outcome.

    Like `TopK` it bounds f-divergences from below. At equal bytes its gradient is closer to the
    exact one, because flat distributions get more tokens.

    Attributes:
        ids: Token ids of each position, as wide as the widest row; where not `kept`, a row repeats
            its first id, which is always kept.
        logprobs: Their log-probabilities under the *whole* vocabulary at `temperature`.
        kept: Mask of the tokens that count.
        tail_logprob: Log-probability of all other tokens.
        temperature: Temperature at which the teacher was read.
        further_tails: The tail's log-probability at other temperatures.
    """

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
        max_k: int,
        min_prob: float,
        temperature: float = 1.0,
        further: Iterable[float] = (),
    ) -> UnevenTopK:
        """Keep each row's tokens of at least `min_prob`, and the probability of the rest.

        Args:
            logits: The teacher's.
            max_k: Most tokens kept in a row.
            min_prob: Smallest kept probability at `temperature`; the most probable token is always
                kept.
            temperature: At which log-probabilities are kept.
            further: Other temperatures to support.
        """
        logp = log_softmax(logits, temperature)
        top = logp.topk(max_k, dim=-1)
        kept = top.values >= math.log(min_prob)
        kept[:, :1] = True
        width = int(kept.sum(-1).max()) if len(kept) else 1
        kept = kept[:, :width]
        ids = torch.where(kept, top.indices[:, :width], top.indices[:, :1])
        tails = {each: tail_of(log_softmax(logits, each), ids) for each in further}
        known = top.values[:, :width].masked_fill(~kept, FLOOR)
        return cls(ids, known, kept, tail_of(logp, ids), temperature, tails)

    @classmethod
    def from_top_k(cls, top: TopK, min_prob: float) -> UnevenTopK:
        """Of the k tokens of each row, most probable first, those of at least `min_prob`."""
        kept = top.logprobs >= math.log(min_prob)
        kept[:, :1] = True
        dropped = top.logprobs.masked_fill(kept, -torch.inf).logsumexp(-1)
        width = int(kept.sum(-1).max()) if len(kept) else 1
        tail, kept = torch.logaddexp(top.tail_logprob, dropped), kept[:, :width]
        ids = torch.where(kept, top.ids[:, :width], top.ids[:, :1])
        known = top.logprobs[:, :width].masked_fill(~kept, FLOOR)
        return cls(ids, known, kept, tail, top.temperature)

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
        """Log-probabilities of the tokens, `FLOOR` where none is kept, then of the tail."""
        tails = {self.temperature: self.tail_logprob, **self.further_tails}
        known = self.logprobs.masked_fill(~self.kept, -torch.inf)
        return kept_and_tail(known, tails, self.temperature, temperature).clamp_min(FLOOR)

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        pair = super().compare(student_logits, temperature)
        absent = torch.nn.functional.pad(~self.kept, (0, 1))
        return pair._replace(student=pair.student.masked_fill(absent, FLOOR))
