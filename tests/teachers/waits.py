"""Copies that a host waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class BlockingCopies(TorchDispatchMode):
    """Records the shapes of tensors that are copied from host memory while the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute, and look at copies."""
        options = dict(kwargs or {})
        result = func(*args, **options)
        if func is torch.ops.aten._to_copy.default:
            source, waits = args[0], not options.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            source, waits = args[1], not (args[2:] or options.get("non_blocking"))
        else:
            return result
        if waits and source.device.type == "cpu" != result.device.type:
            self.found.append(tuple(source.shape))
        return result
