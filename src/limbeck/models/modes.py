"""The mode a module computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and the like switched off, and the mode the module was in restored."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
