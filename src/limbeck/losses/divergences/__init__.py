"""Divergences between two distributions over the same outcomes, one family a file."""

from limbeck.losses.divergences.base import divergences, expectation

__all__ = [
    "divergences",
    "expectation",
]
