"""Tokens sampled from the teacher: a few numbers a position, unbiased.

Source: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
2025, arXiv:2503.16870.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.losses.distributions.base import (
    FLOOR,
    LogProbPair,
    TeacherDistribution,
    entropy_of,
    log_softmax,
)
from limbeck.losses.distributions.systematic import (
    BLOCK,
    run_lengths,
    systematic_tokens,
    widest_float,
)


class DrawnTokens(TeacherDistribution):
    """Random shares of k tokens whose expectation is the teacher's distribution.

    Forward KL's gradient is linear in the teacher's probabilities, so it is unbiased. No other
    divergence is, so no other is supported. The reported value is the cross-entropy under the
    shares minus the teacher's entropy: unbiased for forward KL, but a single row may be negative.
    """

    serves = frozenset({"forward_kl"})

    entropy_nats: Float[Tensor, " N"]
    """Entropy of the whole distribution they were drawn from."""

    temperature: float
    """Temperature of that distribution; no other can be recovered."""

    @abstractmethod
    def tokens(self) -> Int[Tensor, "N k"]:
        """Token ids, all different where their share is not 0."""

    @abstractmethod
    def estimates(self) -> Float[Tensor, "N k"]:
        """Their shares, in at least float32; each row adds up to one."""

    def shares(self, temperature: float) -> Float[Tensor, "N k"]:
        """Their shares; a ConfigError if they were drawn at another temperature."""
        if temperature != self.temperature:
            raise ConfigError(
                f"The teacher's samples were drawn at temperature {self.temperature}, so they "
                f"cannot be compared at {temperature}. Set the term's temperature to "
                f"{self.temperature}, or record the store again."
            )
        return self.estimates()

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        """Student and shares on the k tokens and the tail, whose share is 0.

        Forward KL of this pair lacks `correction`; its gradient is unbiased.
        """
        shares, ids = self.shares(temperature), self.tokens()
        logp = log_softmax(student_logits, temperature)
        was_drawn = torch.zeros_like(logp).scatter_add_(-1, ids, shares.to(logp.dtype)) > 0
        tail = logp.masked_fill(was_drawn, FLOOR).logsumexp(-1, keepdim=True)
        known = logp.gather(-1, ids).masked_fill(shares == 0, FLOOR)
        drawn = shares.log().clamp_min(FLOOR).to(logp.dtype)
        nothing = torch.full_like(tail, FLOOR)
        return LogProbPair(
            torch.cat([known, tail], dim=-1), torch.cat([drawn, nothing], dim=-1).detach()
        )

    def correction(self) -> Float[Tensor, " N"]:
        """Entropy of the shares minus the teacher's; added to their KL it is unbiased."""
        shares = self.estimates()
        return entropy_of(shares.log().clamp_min(FLOOR)) - self.entropy_nats.to(shares.dtype)

    def entropy(self) -> Float[Tensor, " N"]:
        """Entropy of the whole distribution, as it was recorded."""
        return self.entropy_nats


@dataclass(frozen=True)
class Samples(DrawnTokens):
    """N draws from the teacher at each position, as the k different tokens and how often each came.

    The share of a token among the draws has the token's probability as its mean.

    Attributes:
        ids: The tokens drawn, all different where their count is not 0.
        counts: How often each was drawn; 0 fills rows that drew fewer tokens than others.
        entropy_nats: Entropy of the whole distribution they were drawn from.
        temperature: Temperature of that distribution; no other can be recovered.
    """

    ids: Int[Tensor, "N k"]
    counts: Int[Tensor, "N k"]
    num_draws: int
    entropy_nats: Float[Tensor, " N"]
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "N V"],
        num_draws: int,
        temperature: float = 1.0,
        *,
        systematic: bool = True,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Draw from the softmax of each row.

        Args:
            temperature: Of the distribution drawn from.
            systematic: N equally spaced points on the cumulative distribution, shifted together by
                one random offset: every count is N p rounded down or up, which has less variance
                than N independent draws. Otherwise independent draws.
        """
        logp = log_softmax(logits.detach(), temperature)
        probs = logp.exp()
        if systematic:
            ids, kept = systematic_draws(probs, num_draws, generator)
        else:
            drawn = probs.multinomial(num_draws, replacement=True, generator=generator)
            ids, kept = run_lengths(drawn.sort(-1).values)
        return cls(ids, kept, num_draws, entropy_of(logp), temperature)

    def tokens(self) -> Int[Tensor, "N k"]:
        """The tokens drawn."""
        return self.ids

    def estimates(self) -> Float[Tensor, "N k"]:
        """Each token's share of the draws."""
        exact = torch.promote_types(self.entropy_nats.dtype, torch.float32)
        return self.counts.to(exact) / self.num_draws


def drawn_tokens(
    counts: Int[Tensor, "N V"], num_draws: int
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Tokens whose count is not 0, and their counts; as wide as the row that drew most."""
    top = counts.topk(min(num_draws, counts.shape[-1]), dim=-1)
    widest = int((top.values > 0).sum(-1).max()) if len(counts) else 0
    return top.indices[:, :widest], top.values[:, :widest]


def systematic_draws(
    probs: Float[Tensor, "N V"], num_draws: int, generator: torch.Generator | None
) -> tuple[Int[Tensor, "N k"], Int[Tensor, "N k"]]:
    """Tokens drawn, by equally spaced points with one random offset a row, and their counts."""
    dtype = widest_float(probs.device)
    offset = torch.rand((len(probs), 1), dtype=dtype, device=probs.device, generator=generator)
    if num_draws * BLOCK > 2 * probs.shape[-1]:  # gathered blocks would be larger than the row
        return drawn_tokens(systematic_counts(probs.to(dtype), num_draws, offset), num_draws)
    return systematic_tokens(probs, num_draws, offset)


def systematic_counts(
    probs: Float[Tensor, "N V"], num_draws: int, offset: Float[Tensor, "N 1"]
) -> Int[Tensor, "N V"]:
    """How many of the points `(offset + j) / num_draws` fall on each token's interval of [0, 1).

    The intervals lie side by side in the order of the ids, each as long as its token's probability.
    This is the reference that tests compare `systematic_tokens` with.

    Args:
        offset: In [0, 1), one a row.
    """
    ends = probs.cumsum(-1)
    ends = ends / ends[:, -1:]
    below = (ends * num_draws - offset).ceil().clamp(0, num_draws)
    # Rounding must not assign the last point to a token of probability 0.
    below = below.masked_fill(ends >= 1, num_draws)
    return below.diff(dim=-1, prepend=torch.zeros_like(below[:, :1])).long()
