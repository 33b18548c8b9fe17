"""Divergences between two distributions over the same outcomes, one family a file."""

from limbeck.losses.divergences.base import Outcomes, divergences, expectation, gradients

__all__ = [
    "Outcomes",
    "divergences",
    "expectation",
    "gradients",
]
