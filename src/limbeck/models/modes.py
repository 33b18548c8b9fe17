"""The mode a module computes in, and hooks on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; the previous mode is restored."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, Any, Any], None]]],
) -> Iterator[None]:
    """Modules whose output a hook reads in every forward pass inside the context."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def tensor_of(output: Any) -> Any:
    """The hidden states in a block's output."""
    return output[0] if isinstance(output, tuple) else output
