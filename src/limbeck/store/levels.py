"""Probabilities as one byte, or twelve bits, with a stated error.

Large probabilities are even in their square root, which is even in Hellinger distance; small ones
are even in their logarithm, so that no logarithm is far off. Where tokens of small probability are
kept, the rounding of the few large ones would be most of what is lost: four bits more tell which
sixteenth of its level a large one is in.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, UInt8

from limbeck.losses.distributions import FLOOR
from limbeck.store.planes import Unpacker

STEPS = 224
"""A square root is a multiple of 1 / STEPS, down to `LEAST_STEPS` of them."""

LEAST_STEPS = 4

LOG_STEP = 0.5
"""Nats between levels below that; there the two spacings meet."""

SQRT_ERROR = 1 / (2 * STEPS)
"""Most a square root of a probability is off."""

LOG_ERROR = LOG_STEP / 2
"""Most a log-probability is off, nats, down to `LOWEST`."""


def make_levels() -> Float32[np.ndarray, " levels"]:
    """Log-probabilities of the 256 levels, ascending."""
    high = 2 * np.log(np.arange(LEAST_STEPS, STEPS + 1) / STEPS)
    low = high[0] - LOG_STEP * np.arange(256 - len(high), 0, -1)
    return np.concatenate([low, high]).astype(np.float32)


LEVELS = make_levels()
LOWEST = float(LEVELS[0])
"""Log-probability of the lowest level, -25.5; what is less probable is stored as this."""


def boundaries() -> Float32[np.ndarray, " 255"]:
    """Where one level gives way to the next: half-way in square root, or in logarithm."""
    roots = np.exp(LEVELS.astype(np.float64) / 2)
    middle = 2 * np.log((roots[1:] + roots[:-1]) / 2)
    logs = (LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2
    first = 256 - (STEPS - LEAST_STEPS + 1)
    return np.where(np.arange(255) < first, logs, middle).astype(np.float32)


BOUNDARIES = boundaries()


def to_levels(logprobs: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """The nearest level of each log-probability."""
    return np.searchsorted(BOUNDARIES, logprobs.astype(np.float32)).astype(np.uint8)


def from_levels(levels: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Log-probabilities, within `LOG_ERROR`, their square roots within `SQRT_ERROR`."""
    return np.asarray(LEVELS[levels])


PARTS = 16
"""Of a level, where they are told apart."""

PART_ERROR = SQRT_ERROR / PARTS
"""Most a square root of a probability is off there."""

FINE_RATIO = 50
"""How many times the least probability kept a token needs to have twelve bits."""


def first_fine(least: float) -> int:
    """The lowest level whose parts are told apart, where probabilities from `least` on are kept.

    Returns:
        At least the lowest of those even in the square root; 256, which no level reaches, where
        `FINE_RATIO` times `least` is more than 1.
    """
    found = int(np.searchsorted(LEVELS, np.log(FINE_RATIO * least)))
    return max(found, 256 - (STEPS - LEAST_STEPS + 1))


def to_parts(
    logprobs: Float[np.ndarray, " N"], of_levels: UInt8[np.ndarray, " N"]
) -> UInt8[np.ndarray, " bytes"]:
    """Which part of its level each is in, two a byte, the first in the low bits."""
    within = STEPS * np.exp(logprobs.astype(np.float64) / 2) - steps_of(of_levels) + 0.5
    parts = np.clip(np.floor(PARTS * within), 0, PARTS - 1).astype(np.uint8)
    pairs = np.append(parts, np.zeros(len(parts) % 2, np.uint8)).reshape(-1, 2)
    return np.asarray(pairs[:, 0] | pairs[:, 1] << 4)


def from_parts(
    of_levels: UInt8[np.ndarray, " N"], packed: UInt8[np.ndarray, " bytes"]
) -> Float32[np.ndarray, " N"]:
    """Log-probabilities, their square roots within `PART_ERROR`."""
    parts = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: len(of_levels)]
    roots = (steps_of(of_levels) - 0.5 + (parts + 0.5) / PARTS) / STEPS
    return np.asarray(np.minimum(2 * np.log(roots), 0), dtype=np.float32)


def steps_of(of_levels: UInt8[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Square roots of levels that are even in it, in multiples of 1 / STEPS."""
    return of_levels.astype(np.float64) - (255 - STEPS)


MASS_STEPS = 65535


def to_mass(logprobs: Float[np.ndarray, " N"]) -> UInt8[np.ndarray, " bytes"]:
    """Masses as two byte planes: `65535 sqrt(mass)`, rounded, low bytes and then high bytes."""
    roots = np.rint(MASS_STEPS * np.exp(np.minimum(logprobs.astype(np.float64), 0) / 2))
    return np.ascontiguousarray(roots.astype("<u2").view(np.uint8).reshape(-1, 2).T).reshape(-1)


def from_mass(planes: UInt8[np.ndarray, " bytes"]) -> Float32[np.ndarray, " N"]:
    """Log of each mass, whose square root is within 1 / 131070; `FLOOR` where that was 0."""
    roots = np.ascontiguousarray(planes.reshape(2, -1).T).view("<u2").reshape(-1)
    logs = np.full(len(roots), FLOOR, dtype=np.float32)
    some = roots > 0
    logs[some] = 2 * np.log(roots[some] / MASS_STEPS)
    return logs


def read_masses(unpack: Unpacker, entries: int) -> Float32[np.ndarray, " N"]:
    """Log of the next masses.

    Raises:
        DataError: They are not there.
    """
    return from_mass(unpack.next(2 * entries))


def beside_tail(
    known: Float32[np.ndarray, "N k"], tail: Float32[np.ndarray, " N"]
) -> Float32[np.ndarray, "N k"]:
    """Log-probabilities in the same ratios, which hold together what a tail leaves."""
    exact = known.astype(np.float64)
    largest = exact.max(-1, keepdims=True, initial=FLOOR)
    total = largest + np.log(np.exp(exact - largest).sum(-1, keepdims=True))
    left = np.log(np.maximum(-np.expm1(tail.astype(np.float64)), np.exp(-700)))
    return np.asarray(np.maximum(exact - total + left[:, None], FLOOR), dtype=np.float32)
