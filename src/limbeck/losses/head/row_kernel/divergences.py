"""Divergences of the row kernels: value and gradient of one outcome, in Triton.

`VALUE(logq, logp, q, p, c0, c1)` and `SLOPE(...)` are functions of the log-probabilities (at least
`FLOOR`) and probabilities of student and teacher. `SLOPE` is the derivative with respect to logq,
up to a multiple of q, as in `Outcomes`. c0 and c1 are the divergence's options, or what its kind
says. Formulas and sources stand beside the PyTorch versions in `limbeck.losses.divergences`.

`no_type_check` keeps run-time type checkers away from functions that are compiled from source.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754944e-38)
LOG2E = tl.constexpr(1.4426950408889634)

SUM = tl.constexpr(0)
"""The divergence is the sum of `VALUE`."""
FORWARD = tl.constexpr(1)
"""Forward KL: the online sums give its value, and the sum of `SLOPE` is -1."""
REVERSE = tl.constexpr(2)
"""Reverse KL: the online sums give its value, which is also the sum of `SLOPE`."""
LOG_SUM = tl.constexpr(3)
"""The divergence is -log sum exp `VALUE`; `SLOPE` gets that log sum as c0."""
MIXED = tl.constexpr(4)
"""`VALUE` and `SLOPE` are linear in c0, a weight that `MIX` computes from the row's sum of `VALUE`
at c0 = 0."""


@triton.jit
@no_type_check
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
@no_type_check
def log_mix(q, p, share):
    """Log of `share` of the teacher and the rest of the student."""
    mixture = share * p + (1 - share) * q
    return tl.log(tl.maximum(mixture, TINY, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
@no_type_check
def no_mix(rest, c0, c1):
    return c0


@triton.jit
@no_type_check
def forward_kl_value(logq, logp, q, p, c0, c1):
    return p * (logp - logq)


@triton.jit
@no_type_check
def forward_kl_slope(logq, logp, q, p, c0, c1):
    return -p


@triton.jit
@no_type_check
def reverse_kl_value(logq, logp, q, p, c0, c1):
    return q * (logq - logp)


@triton.jit
@no_type_check
def jensen_shannon_value(logq, logp, q, p, c0, c1):
    mixture = log_mix(q, p, c0)
    return c0 * p * (logp - mixture) + (1 - c0) * q * (logq - mixture)


@triton.jit
@no_type_check
def jensen_shannon_slope(logq, logp, q, p, c0, c1):
    return (1 - c0) * q * (logq - log_mix(q, p, c0))


@triton.jit
@no_type_check
def skew_forward_kl_value(logq, logp, q, p, c0, c1):
    return p * (logp - log_mix(q, p, c0))


@triton.jit
@no_type_check
def skew_forward_kl_slope(logq, logp, q, p, c0, c1):
    return (c0 - 1) * q * exp(logp - log_mix(q, p, c0))  # p / m could be 0 / 0


@triton.jit
@no_type_check
def skew_reverse_kl_value(logq, logp, q, p, c0, c1):
    return q * (logq - log_mix(q, p, 1 - c0))


@triton.jit
@no_type_check
def skew_reverse_kl_slope(logq, logp, q, p, c0, c1):
    gap = logq - log_mix(q, p, 1 - c0)
    return q * (gap - c0 * exp(gap))


@triton.jit
@no_type_check
def total_variation_value(logq, logp, q, p, c0, c1):
    return 0.5 * tl.abs(q - p)


@triton.jit
@no_type_check
def total_variation_slope(logq, logp, q, p, c0, c1):
    return tl.where(q > p, 0.5 * q, tl.where(q < p, -0.5 * q, 0.0))


@triton.jit
@no_type_check
def lk_value(logq, logp, q, p, c0, c1):
    return tl.minimum(logq, logp, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def lk_slope(logq, logp, q, p, c0, c1):
    share = tl.where(logq < logp, 1.0, tl.where(logq == logp, 0.5, 0.0))
    return -share * exp(tl.minimum(logq, logp) - c0)


@triton.jit
@no_type_check
def lk_kl_value(logq, logp, q, p, c0, c1):
    return c0 * p * (logp - logq) + (1 - c0) * 0.5 * tl.abs(q - p)


@triton.jit
@no_type_check
def lk_kl_slope(logq, logp, q, p, c0, c1):
    return (1 - c0) * total_variation_slope(logq, logp, q, p, c0, c1) - c0 * p


@triton.jit
@no_type_check
def lk_kl_mix(rest, c0, c1):
    return c0 * exp(-c1 * (1 - rest))


@triton.jit
@no_type_check
def likelihood_value(logq, logp, q, p, c0, c1):
    return -p * logq


class RowDivergence(NamedTuple):
    """A divergence of the row kernels: compiled functions, and its kind."""

    value: Any
    slope: Any
    mix: Any = no_mix
    kind: Any = SUM


ROW_DIVERGENCES = {
    "forward_kl": RowDivergence(forward_kl_value, forward_kl_slope, kind=FORWARD),
    "reverse_kl": RowDivergence(reverse_kl_value, reverse_kl_value, kind=REVERSE),
    "jensen_shannon": RowDivergence(jensen_shannon_value, jensen_shannon_slope),
    "skew_forward_kl": RowDivergence(skew_forward_kl_value, skew_forward_kl_slope),
    "skew_reverse_kl": RowDivergence(skew_reverse_kl_value, skew_reverse_kl_slope),
    "total_variation": RowDivergence(total_variation_value, total_variation_slope),
    "lk": RowDivergence(lk_value, lk_slope, kind=LOG_SUM),
    "lk_kl": RowDivergence(lk_kl_value, lk_kl_slope, lk_kl_mix, MIXED),
}
"""By name. Options are c0 and c1 in the order of the PyTorch version's signature."""

LIKELIHOOD = RowDivergence(likelihood_value, forward_kl_slope)
"""Cross-entropy under the teacher's shares: forward KL from sampled tokens, but for a constant."""
