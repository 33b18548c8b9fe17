"""The matrix products of a step, and how long they take alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MM, ADDMM = (torch.ops.aten.mm,), (torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Product(NamedTuple):
    """A product of an M x K and a K x N matrix as they lay in memory; `adds` to what is there."""

    left: tuple[tuple[int, ...], tuple[int, ...]]
    right: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    adds: bool

    @property
    def flops(self) -> int:
        """Operations, 2 for each of its M x K x N."""
        (rows, inner), columns = self.left[0], self.right[0][1]
        return 2 * rows * inner * columns


class Recorded(TorchDispatchMode):
    """Counts every product inside the context; attention inside a fused kernel is not one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        pair = args[:2] if packet in MM else args[1:3] if packet in ADDMM else None
        if pair is not None:
            left, right = ((tuple(each.shape), tuple(each.stride())) for each in pair)
            self.products[Product(left, right, pair[0].dtype, packet in ADDMM)] += 1
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], object]) -> Counter[Product]:
    """The products of one step."""
    recorded = Recorded()
    with recorded:
        step()
    return recorded.products


def seconds_alone(products: Counter[Product], device: torch.device, repeats: int = 3) -> float:
    """Time of all products, each shape timed alone in the layout it has in the step."""
    return sum(count * one(each, device, repeats) for each, count in products.items())


def one(product: Product, device: torch.device, repeats: int) -> float:
    """Fastest of some runs of one product into memory that is there."""
    left, right = (laid(*each, product.dtype, device) for each in (product.left, product.right))
    out = torch.zeros(left.shape[0], right.shape[1], dtype=product.dtype, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        if product.adds:
            torch.addmm(out, left, right, out=out)
        else:
            torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def laid(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A matrix of ones with the given strides."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return torch.ones(size, dtype=dtype, device=device).as_strided(shape, stride)
