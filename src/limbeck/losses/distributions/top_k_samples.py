"""The teacher's most probable tokens exactly, and unbiased samples of all the others.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
2025, arXiv:2503.16870, applied to the tail only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.losses.distributions.base import FLOOR, entropy_of, log_softmax
from limbeck.losses.distributions.samples import DrawnTokens, systematic_draws
from limbeck.losses.distributions.systematic import widest_float


@dataclass(frozen=True)
class TopKSamples(DrawnTokens):
    """The k most probable tokens, and draws from the tail, renormalised.

    A drawn token's share is the tail's probability times its share of the draws, whose mean is the
    token's own probability. With k = 0 these are `Samples`.

    Attributes:
        logprobs: Their log-probabilities under the *whole* vocabulary at `temperature`.
        tail_logprob: Log of the probability of all other tokens.
        drawn_ids: Tokens drawn from the tail, all different where their count is not 0.
        counts: How often each was drawn; 0 fills rows that drew fewer tokens than others.
        entropy_nats: Entropy of the whole distribution.
        temperature: Temperature of that distribution; no other can be recovered.
    """

    ids: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    tail_logprob: Float[Tensor, " N"]
    drawn_ids: Int[Tensor, "N m"]
    counts: Int[Tensor, "N m"]
    num_draws: int
    entropy_nats: Float[Tensor, " N"]
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "N V"],
        k: int,
        num_draws: int,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> TopKSamples:
        """Keep the k largest logits of each row, and draw systematically from the rest."""
        logp = log_softmax(logits.detach(), temperature)
        top = logp.topk(k, dim=-1)
        tail = logp.scatter(-1, top.indices, FLOOR).logsumexp(-1).clamp_min(FLOOR)
        whole = logp.to(widest_float(logp.device)).softmax(-1)
        others = whole.scatter(-1, top.indices, 0.0)
        # An empty tail is replaced by the whole row: its draws then have a share of 0.
        others = torch.where(others.sum(-1, keepdim=True) > 0, others, whole)
        drawn_ids, counts = systematic_draws(others, num_draws, generator)
        entropy = entropy_of(logp)
        return cls(
            top.indices, top.values, tail, drawn_ids, counts, num_draws, entropy, temperature
        )

    def tokens(self) -> Int[Tensor, "N km"]:
        """The k tokens, then those drawn."""
        return torch.cat([self.ids, self.drawn_ids], dim=-1)

    def estimates(self) -> Float[Tensor, "N km"]:
        """The k probabilities, then each drawn token's share of the tail's."""
        exact = torch.promote_types(self.entropy_nats.dtype, torch.float32)
        known, tail = self.logprobs.to(exact).exp(), self.tail_logprob.to(exact).exp()
        drawn = self.counts.to(exact) / self.num_draws * tail[:, None]
        return torch.cat([known, drawn], dim=-1)
