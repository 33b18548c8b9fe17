"""Probabilities quantized to 8 or 12 bits with a bounded error.

The 256 levels are uniform in the square root for large probabilities (uniform in Hellinger
distance), and uniform in the logarithm for small ones, which bounds the error of every
log-probability. Where tokens of small probability are kept too, the rounding of the few large ones
would dominate the error, so four more bits give the sixteenth of its level for each large one.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, UInt8

from limbeck.losses.distributions import FLOOR
from limbeck.store.byte_planes import Unpacker

STEPS = 224
"""Square roots of large probabilities are multiples of 1 / STEPS, from MIN_STEPS / STEPS up."""

MIN_STEPS = 4

LOG_STEP = 0.5
"""Nats between the levels below that, where the two spacings are about equal."""

SQRT_ERROR = 1 / (2 * STEPS)
"""Largest error of the square root of a probability."""

LOG_ERROR = LOG_STEP / 2
"""Largest error of a log-probability in nats, from `LOWEST` up."""


def make_levels() -> Float32[np.ndarray, " levels"]:
    """Log-probabilities of the 256 levels, ascending."""
    high = 2 * np.log(np.arange(MIN_STEPS, STEPS + 1) / STEPS)
    low = high[0] - LOG_STEP * np.arange(256 - len(high), 0, -1)
    return np.concatenate([low, high]).astype(np.float32)


LEVELS = make_levels()
LOWEST = float(LEVELS[0])
"""Log-probability of the lowest level, -25.5; smaller ones are stored as this."""


def boundaries() -> Float32[np.ndarray, " 255"]:
    """Boundaries between levels: the midpoint in the square root, or in the logarithm."""
    roots = np.exp(LEVELS.astype(np.float64) / 2)
    middle = 2 * np.log((roots[1:] + roots[:-1]) / 2)
    logs = (LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2
    first = 256 - (STEPS - MIN_STEPS + 1)
    return np.where(np.arange(255) < first, logs, middle).astype(np.float32)


BOUNDARIES = boundaries()


def to_levels(logprobs: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """The nearest level of each log-probability."""
    return np.searchsorted(BOUNDARIES, logprobs.astype(np.float32)).astype(np.uint8)


def from_levels(levels: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Log-probabilities of levels: within `LOG_ERROR`, and in the square root `SQRT_ERROR`."""
    return np.asarray(LEVELS[levels])


PARTS = 16
"""Subdivisions of a level in the 12-bit code."""

SIXTEENTH_ERROR = SQRT_ERROR / PARTS
"""Largest error of the square root of a probability in the 12-bit code."""

FINE_RATIO = 50
"""A token has 12 bits if it is this many times as probable as `min_prob`."""


def first_fine_level(min_prob: float) -> int:
    """The lowest level with a 12-bit code, where probabilities of at least `min_prob` are kept.

    Returns:
        A level among those uniform in the square root; 256, above every level, if `FINE_RATIO`
        times `min_prob` exceeds 1.
    """
    level = int(np.searchsorted(LEVELS, np.log(FINE_RATIO * min_prob)))
    return max(level, 256 - (STEPS - MIN_STEPS + 1))


def to_sixteenths(
    logprobs: Float[np.ndarray, " N"], of_levels: UInt8[np.ndarray, " N"]
) -> UInt8[np.ndarray, " bytes"]:
    """The sixteenth of its level that each is in: two a byte, the first in the low bits."""
    within = STEPS * np.exp(logprobs.astype(np.float64) / 2) - steps_of(of_levels) + 0.5
    parts = np.clip(np.floor(PARTS * within), 0, PARTS - 1).astype(np.uint8)
    pairs = np.append(parts, np.zeros(len(parts) % 2, np.uint8)).reshape(-1, 2)
    return np.asarray(pairs[:, 0] | pairs[:, 1] << 4)


def from_sixteenths(
    of_levels: UInt8[np.ndarray, " N"], packed: UInt8[np.ndarray, " bytes"]
) -> Float32[np.ndarray, " N"]:
    """Log-probabilities, within `SIXTEENTH_ERROR` in the square root."""
    parts = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: len(of_levels)]
    roots = (steps_of(of_levels) - 0.5 + (parts + 0.5) / PARTS) / STEPS
    return np.asarray(np.minimum(2 * np.log(roots), 0), dtype=np.float32)


def steps_of(of_levels: UInt8[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Square roots of levels that are uniform in the square root, in units of 1 / STEPS."""
    return of_levels.astype(np.float64) - (255 - STEPS)


PROB_STEPS = 65535


def encode_probs(logprobs: Float[np.ndarray, " N"]) -> UInt8[np.ndarray, " bytes"]:
    """Probabilities as two byte planes: `65535 sqrt(p)`, rounded; low bytes, then high bytes."""
    roots = np.rint(PROB_STEPS * np.exp(np.minimum(logprobs.astype(np.float64), 0) / 2))
    return np.ascontiguousarray(roots.astype("<u2").view(np.uint8).reshape(-1, 2).T).reshape(-1)


def decode_probs(planes: UInt8[np.ndarray, " bytes"]) -> Float32[np.ndarray, " N"]:
    """Log-probabilities, within 1 / 131070 in the square root; `FLOOR` for a probability of 0."""
    roots = np.ascontiguousarray(planes.reshape(2, -1).T).view("<u2").reshape(-1)
    logs = np.full(len(roots), FLOOR, dtype=np.float32)
    positive = roots > 0
    logs[positive] = 2 * np.log(roots[positive] / PROB_STEPS)
    return logs


def read_probs(unpack: Unpacker, entries: int) -> Float32[np.ndarray, " N"]:
    """The next log-probabilities of an encoded signal."""
    return decode_probs(unpack.next(2 * entries))


def rescale_to_tail(
    known: Float32[np.ndarray, "N k"], tail: Float32[np.ndarray, " N"]
) -> Float32[np.ndarray, "N k"]:
    """Log-probabilities rescaled so that they and the tail sum to one."""
    exact = known.astype(np.float64)
    largest = exact.max(-1, keepdims=True, initial=FLOOR)
    total = largest + np.log(np.exp(exact - largest).sum(-1, keepdims=True))
    left = np.log(np.maximum(-np.expm1(tail.astype(np.float64)), np.exp(-700)))
    return np.asarray(np.maximum(exact - total + left[:, None], FLOOR), dtype=np.float32)
