"""The teacher's most probable tokens, and the probability of the tail."""

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
    """The probabilities of k tokens and of the tail, all other tokens merged (K = k + 1)."""

    merges_outcomes = True

    ids: Int[Tensor, "N k"]
    """The k token ids of each position."""

    temperature: float
    """Temperature at which the teacher was read."""

    @abstractmethod
    def at(self, temperature: float) -> Float[Tensor, "N k1"]:
        """Log-probabilities of the k tokens, then of the tail, without a gradient.

        Raises:
            ConfigError: The teacher was not read at this temperature.
        """

    def compare(self, student_logits: Float[Tensor, "N V"], temperature: float) -> LogProbPair:
        """Both models on the k tokens and the tail."""
        teacher = self.at(temperature)
        logp = log_softmax(student_logits, temperature)
        tail = tail_of(logp, self.ids)[:, None]
        return LogProbPair(torch.cat([logp.gather(-1, self.ids), tail], dim=-1), teacher)

    def entropy(self) -> Float[Tensor, " N"]:
        """Entropy over the k tokens and the tail, at the recorded temperature."""
        return entropy_of(self.at(self.temperature))


@dataclass(frozen=True)
class TopK(KeptTokens):
    """The teacher's k most probable tokens; all others are merged into one outcome.

    Merging outcomes can only shrink an f-divergence (data-processing inequality), so a loss
    computed here is a lower bound of the dense one; it equals it when teacher and student agree up
    to a factor on the merged tail.

    Attributes:
        ids: The k token ids of each position, all different.
        logprobs: Their log-probabilities under the *whole* vocabulary at `temperature`.
        tail_logprob: Log-probability of all other tokens. Stored, because `log(1 - sum)` loses all
            digits when the tail is small. With `FLOOR` and renormalised `logprobs`, the form of
            many public stores, the optimal student is over-confident: one equal to its teacher has
            a forward KL of -log of the k tokens' total probability, and a gradient.
        temperature: Temperature at which the teacher was read.
        further_tails: The tail's log-probability at other temperatures, from which the k tokens'
            follow. All other temperatures are refused.
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
        """Keep the k largest logits of each row, and the probability of the rest.

        Args:
            logits: The teacher's.
            k: Tokens kept of each row.
            temperature: At which the k log-probabilities are kept.
            further: Other temperatures to support; one number a row for each.
        """
        logp = log_softmax(logits, temperature)
        top = logp.topk(k, dim=-1)
        tails = {each: tail_of(log_softmax(logits, each), top.indices) for each in further}
        return cls(top.indices, top.values, tail_of(logp, top.indices), temperature, tails)

    def fewer(self, k: int) -> TopK:
        """The k most probable of these tokens; the others join the tail, at one temperature."""
        values, order = self.logprobs.sort(dim=-1, descending=True, stable=True)
        tail = torch.logaddexp(self.tail_logprob, values[:, k:].logsumexp(-1))
        return TopK(self.ids.gather(-1, order)[:, :k], values[:, :k], tail, self.temperature)

    def at(self, temperature: float) -> Float[Tensor, "N k1"]:
        tails = {self.temperature: self.tail_logprob, **self.further_tails}
        return kept_and_tail(self.logprobs, tails, self.temperature, temperature).clamp_min(FLOOR)


def tail_of(logp: Float[Tensor, "N V"], ids: Int[Tensor, "N k"]) -> Float[Tensor, " N"]:
    """Log-probability of all tokens but `ids`."""
    return logp.scatter(-1, ids, FLOOR).logsumexp(-1)


def kept_and_tail(
    known: Float[Tensor, "N k"],
    tails: Mapping[float, Float[Tensor, " N"]],
    recorded: float,
    temperature: float,
) -> Float[Tensor, "N k1"]:
    """Log-probabilities of kept tokens at a temperature, then of the tail, without a gradient.

    Args:
        known: The tokens' at the recorded temperature; -inf where none is kept.
        tails: The tail's at each temperature it was recorded at.
        recorded: Temperature of `known`.
        temperature: The temperature to convert to.
    """
    require_recorded(temperature, tuple(tails))
    exact = torch.promote_types(known.dtype, torch.float32)
    known, tail = known.to(exact), tails[temperature].to(exact)
    if temperature != recorded:
        # The tokens' total probability is one minus the tail's; their ratios are known.
        known = torch.log_softmax(known * (recorded / temperature), dim=-1)
        known = known + log_one_minus_exp(tail)[:, None]
    return torch.cat([known, tail[:, None]], dim=-1).detach()


def require_recorded(temperature: float, recorded: Sequence[float]) -> None:
    """Raise a ConfigError if the teacher was not recorded at a temperature."""
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
