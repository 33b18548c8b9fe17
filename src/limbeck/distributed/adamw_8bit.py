"""AdamW that keeps the moments of matrices in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, zeros
from torch.optim import Optimizer

from limbeck.distributed.sharding import local

BLOCK = 256
"""Numbers of a row that share one scale."""

AT_A_TIME = 2**22
"""Numbers of a matrix that are decoded at once, which bounds the memory of a step."""

SMALLEST = 4096
"""Matrices of fewer numbers, and all vectors, keep moments in float32."""


class AdamW8bit(Optimizer):
    """AdamW with 2 bytes of state for each number of a matrix, and 8 for each block of a row.

    Each row of a matrix is cut into blocks of 256 numbers. A moment is stored as the block's
    largest size and, for each number, one of 256 shares of it that lie closer together near 0. Of
    the second moment the root is stored, at least the smallest share: squares span twice the
    decades, and a divisor rounded to 0 would make a step without bound.

    Blocks lie in a row, so a matrix sharded by rows has the same state as a whole one, and a
    checkpoint can be read by any number of ranks. The step is torch's AdamW in float32.

    Source: Dettmers et al., 2022, arXiv:2110.02861 (block-wise dynamic quantisation).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.register_load_state_dict_post_hook(narrow)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(first_state(parameter))
        state["step"] += 1
        step = int(state["step"])
        mine = {name: local(value) for name, value in state.items()}
        weight, gradient = local(parameter), local(gradient)
        if not is_in_8_bits(parameter):
            update(weight, gradient, mine["mean"], mine["square"], group, step)
            return
        for rows in slices(weight):
            part = {name: value[rows] for name, value in mine.items() if name != "step"}
            mean = decoded(part["mean"], part["mean_scale"], signed=True)
            square = decoded(part["root"], part["root_scale"], signed=False).square_()
            update(weight[rows], gradient[rows], mean, square, group, step)
            encode(mean, part["mean"], part["mean_scale"], signed=True)
            encode(square.sqrt_(), part["root"], part["root_scale"], signed=False)


def narrow(optimizer: Optimizer) -> None:
    """Make codes bytes again: loading a state gives all of it the type of its parameter."""
    for parameter, state in optimizer.state.items():
        if is_in_8_bits(parameter):
            state |= {name: state[name].to(torch.uint8) for name in ("mean", "root")}


def update(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    group: dict[str, Any],
    step: int,
) -> None:
    """One step of AdamW in place (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""
    beta1, beta2 = group["betas"]
    gradient = gradient.to(mean.dtype).reshape(mean.shape)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight.sub_((mean / root).mul_(group["lr"] / (1 - beta1**step)).view_as(weight))


def first_state(parameter: Tensor) -> dict[str, Tensor]:
    """Moments of zero, sharded as their parameter is."""
    state = {"step": torch.zeros(())}
    if not is_in_8_bits(parameter):
        for name in ("mean", "square"):
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state
    blocks = -(-math.prod(parameter.shape[1:]) // BLOCK)
    for name in ("mean", "root"):
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        state[f"{name}_scale"] = zeros_of(parameter, (len(parameter), blocks))
    return state


def zeros_of(parameter: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros that are sharded by rows as a parameter is."""
    if isinstance(parameter, DTensor):
        made: Tensor = zeros(
            *shape, device_mesh=parameter.device_mesh, placements=parameter.placements
        )
        return made
    return torch.zeros(shape, device=parameter.device)


def is_in_8_bits(parameter: Tensor) -> bool:
    """Whether the moments of a parameter are kept in 8 bits; the same on every rank."""
    return parameter.ndim >= 2 and parameter.numel() >= SMALLEST


def moment_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter's moments."""
    if not is_in_8_bits(parameter):
        return 2 * 4 * parameter.numel()
    blocks = -(-math.prod(parameter.shape[1:]) // BLOCK)
    return 2 * (parameter.numel() + 4 * len(parameter) * blocks)


def slices(weight: Tensor) -> Iterator[slice]:
    """Rows of a matrix, some at a time."""
    rows = max(1, AT_A_TIME // max(1, weight[:1].numel()))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


@cache
def levels(device: torch.device, *, signed: bool) -> Float[Tensor, " 256"]:
    """The 256 numbers between -1 (or 0) and 1 that a number can be rounded to, in order.

    Kept on each device: to copy them there in every step would make the host wait.

    The k-th of 7 decades below 1 has 2^k equal parts (twice as many without a sign), k = 0 for the
    lowest; the levels are the middles of the parts, their negatives, 0 and 1.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [0.1 + 0.9 * (i + 0.5) / parts for i in range(parts)]
        sizes = [10.0 ** (decade - 6) * middle for middle in middles]
        numbers += sizes + ([-size for size in sizes] if signed else [])
    return torch.tensor(sorted(numbers), device=device)


@cache
def borders(device: torch.device, *, signed: bool) -> Float[Tensor, " 255"]:
    """The numbers between two levels, each rounded to the lower one.

    Without a sign the first border is 0: numbers above 0 stay above 0.
    """
    table = levels(device, signed=signed)
    between = (table[1:] + table[:-1]) / 2
    return between if signed else torch.cat([torch.zeros_like(between[:1]), between[1:]])


def decoded(
    codes: UInt8[Tensor, n * shape], scales: Float[Tensor, "n b"], *, signed: bool
) -> Float[Tensor, "n d"]:
    """The numbers behind codes."""
    numbers = levels(codes.device, signed=signed)[codes.flatten(1).int()]
    return numbers.mul_(spread(scales, numbers.shape[1]))


def encode(
    numbers: Float[Tensor, "n d"],
    codes: UInt8[Tensor, n * shape],
    scales: Float[Tensor, "n b"],
    *,
    signed: bool,
) -> None:
    """Round numbers to the nearest levels of their blocks, and write codes and scales in place."""
    width = numbers.shape[1]
    padded = nn.functional.pad(numbers.abs(), (0, scales.shape[1] * BLOCK - width))
    scales.copy_(padded.view(len(numbers), -1, BLOCK).amax(-1))
    shares = numbers / spread(scales, width).clamp_min(torch.finfo(numbers.dtype).tiny)
    found = torch.bucketize(shares, borders(numbers.device, signed=signed), out_int32=True)
    codes.copy_(found.view(codes.shape))


def spread(scales: Float[Tensor, "n b"], width: int) -> Float[Tensor, "n d"]:
    """The scale of each number."""
    return scales.repeat_interleave(BLOCK, dim=1)[:, :width]
