"""Probabilities as one byte, with a stated error.

Large probabilities are even in their square root, which is even in Hellinger distance; small ones
are even in their logarithm, so that no logarithm is far off.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, UInt8

from limbeck.signals import FLOOR
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
