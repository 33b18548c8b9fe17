"""The teacher's most probable tokens, with the mass of all others, or without it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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


class KeptTokens(TeacherDistribution):
    """A teacher that speaks about k tokens and about all the others together (K = k + 1)."""

    merges_outcomes = True

    ids: Int[Tensor, "N k"]
    """The k token ids of each position, all different."""

    temperature: float
    """Temperature at which the teacher was read."""

    @abstractmethod
    def at(self, temperature: float) -> Float[Tensor, "N k1"]:
        """Log-probabilities of the k tokens, then of all the others, without a gradient.

        Raises:
            ConfigError: The teacher was not read at this temperature.
        """

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        """Both models on the k tokens and the rest."""
        teacher = self.at(temperature)
        logp = log_softmax(student_logits, temperature)
        tail = logp.scatter(-1, self.ids, FLOOR).logsumexp(-1, keepdim=True)
        return LogProbPair(torch.cat([logp.gather(-1, self.ids), tail], dim=-1), teacher)

    def entropy(self) -> Float[Tensor, " N"]:
        """Entropy over the k tokens and the rest, at the temperature of the recording."""
        return entropy_of(self.at(self.temperature))


@dataclass(frozen=True)
class TopK(KeptTokens):
    """The teacher's k most probable tokens; all the others are one outcome (K = k + 1).

    Merging outcomes can only shrink an f-divergence (data-processing inequality), so a loss
    computed here is a lower bound of the dense one; it equals it when teacher and student agree up
    to a factor on the merged tail.

    Attributes:
        ids: The k token ids of each position, all different.
        logprobs: Their log-probabilities under the *whole* vocabulary at `temperature`.
        tail_logprob: Log of the probability of all other tokens. Stored, not computed as
            `log(1 - sum)`, which loses all digits when the tail is small.
        temperature: Temperature at which the teacher was read.
        further_tails: The tail's log-probability at other temperatures. With it the k tokens are
            known there too; without it nothing is, so such a temperature is refused.
    """

    ids: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    tail_logprob: Float[Tensor, " N"]
    temperature: float = 1.0
    further_tails: Mapping[float, Float[Tensor, " N"]] = field(default_factory=dict)

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "N V"],
        k: int,
        temperature: float = 1.0,
        further: Iterable[float] = (),
    ) -> TopK:
        """Keep the k largest logits of each row, and the mass of the rest.

        Args:
            logits: The teacher's.
            k: Tokens kept of each row.
            temperature: At which the k log-probabilities are kept.
            further: Other temperatures it shall serve; a number a row for each.
        """
        logp = log_softmax(logits, temperature)
        top = logp.topk(k, dim=-1)

        def tail(other: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
            return other.scatter(-1, top.indices, FLOOR).logsumexp(-1)

        tails = {each: tail(log_softmax(logits, each)) for each in further}
        return cls(top.indices, top.values, tail(logp), temperature, tails)

    def at(self, temperature: float) -> Float[Tensor, "N k1"]:
        """Log-probabilities of the k tokens, then of the tail.

        Raises:
            ConfigError: The teacher was not read at this temperature.
        """
        tails = {self.temperature: self.tail_logprob, **self.further_tails}
        return kept_and_tail(self.logprobs, tails, self.temperature, temperature).clamp_min(FLOOR)


@dataclass(frozen=True)
class TopKRenormalised(KeptTokens):
    """The teacher's k most probable tokens, divided by their mass Z: **biased**, by its form.

    What many public stores hold. All other tokens count as impossible, so the student that is best
    here is over-confident: a student equal to its teacher pays -log Z in forward KL, with a
    gradient that is not zero, and the error does not average out however much is trained on. It
    is here to read such stores and to compare with; `TopK` holds one number a row more and has no
    such bias.

    Attributes:
        ids: The k token ids of each position, all different.
        logprobs: Their log-probabilities, divided by Z or not; only ratios are read.
        temperature: Temperature at which the teacher was read.
    """

    serves = frozenset({"forward_kl", "jensen_shannon", "skew_forward_kl", "total_variation"})

    ids: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    temperature: float = 1.0

    @classmethod
    def from_logits(
        cls, logits: Float[Tensor, "N V"], k: int, temperature: float = 1.0
    ) -> TopKRenormalised:
        """Keep the k largest logits of each row, and forget the rest."""
        top = log_softmax(logits, temperature).topk(k, dim=-1)
        return cls(top.indices, torch.log_softmax(top.values, -1), temperature)

    def at(self, temperature: float) -> Float[Tensor, "N k1"]:
        """Log-probabilities of the k tokens, whose sum is one; the others are impossible.

        Raises:
            ConfigError: The teacher was not read at this temperature.
        """
        require_recorded(temperature, (self.temperature,))
        known = log_softmax(self.logprobs, 1.0)
        return torch.cat([known, torch.full_like(known[:, :1], FLOOR)], dim=-1).detach()


def kept_and_tail(
    known: Float[Tensor, "N k"],
    tails: Mapping[float, Float[Tensor, " N"]],
    recorded: float,
    temperature: float,
) -> Float[Tensor, "N k1"]:
    """Log-probabilities of kept tokens at a temperature, then of the tail, without a gradient.

    Args:
        known: The tokens' at the temperature they were recorded at; -inf where there is none.
        tails: The tail's at each temperature it was recorded at.
        recorded: Where `known` was.
        temperature: What is asked for.

    Raises:
        ConfigError: The teacher was not read there.
    """
    require_recorded(temperature, tuple(tails))
    exact = torch.promote_types(known.dtype, torch.float32)
    known, tail = known.to(exact), tails[temperature].to(exact)
    if temperature != recorded:
        # What the tokens hold together is what the tail leaves; their ratios are known.
        known = torch.log_softmax(known * (recorded / temperature), dim=-1)
        known = known + log_one_minus_exp(tail)[:, None]
    return torch.cat([known, tail[:, None]], dim=-1).detach()


def require_recorded(temperature: float, recorded: Sequence[float]) -> None:
    """Refuse a temperature a teacher was not read at.

    Raises:
        ConfigError: It was not; the recorded ones are named.
    """
    have = " and ".join(str(each) for each in recorded)
    if temperature not in recorded:
        raise ConfigError(
            f"The teacher's top-k was recorded at temperature {have}, so it cannot "
            f"be compared at {temperature}. Set the term's temperature to {have}, "
            f"or record the store again."
        )


def log_one_minus_exp(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Log(1 - e^x) for x < 0, without losing digits at either end."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    small = torch.where(near, x, -1.0)
    large = torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
