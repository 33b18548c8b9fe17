"""What the row kernels take, and how they read and write logits."""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import triton
import triton.language as tl

from limbeck.losses import logit_transforms
from limbeck.losses.distributions import base
from limbeck.losses.head.row_kernel.divergences import LOG2E, exp

FLOOR = tl.constexpr(base.FLOOR)
LOWEST = tl.constexpr(-3e38)
"""In place of -inf where two of them would be subtracted."""

SCALED = tl.constexpr(logit_transforms.SCALED)
CAPPED = tl.constexpr(logit_transforms.CAPPED)


class Rows(NamedTuple):
    """Logits in memory, and the transform still to be applied to them.

    Attributes:
        start: Pointer to the first row.
        pitch: Elements from one row to the next.
        length: Columns that may be read: V, or V rounded up to 16 where rows are padded. A mask
            that ends anywhere makes every access two bytes wide, one that ends at 16 does not.
        scale: As in `Elementwise`, like the next two.
        cap: The largest logit.
        transform: Its kind.
    """

    start: Any
    pitch: Any
    length: Any
    scale: Any
    cap: Any
    transform: Any


class Sparse(NamedTuple):
    """K outcomes of one token each, and the tail.

    Attributes:
        ids: [n, K], distinct; -1 where a place is not used.
        logprobs: [n, K + 1], the tail's last.
        size: K.
    """

    ids: Any
    logprobs: Any
    size: Any


class Tokens(NamedTuple):
    """One number a row: target and weight are read, divergence and cross-entropy are written."""

    targets: Any
    weights: Any
    soft: Any
    hard: Any


class Factors(NamedTuple):
    """Numbers of the objective: V, 1 / T, factors of both gradients, the divergence's options."""

    vocabulary: Any
    inv_t: Any
    soft: Any
    hard: Any
    c0: Any
    c1: Any


class Flags(NamedTuple):
    """Compile-time switches.

    Attributes:
        temperature: 1, 2, or 0 for any other: those two save an exponential.
        has_hard: Whether there is a cross-entropy.
        has_weight: Whether rows have weights.
        gradient: Whether it is wanted.
        block: Columns read at once.
        kept_block: At least K; a power of 2.
    """

    temperature: Any
    has_hard: Any
    has_weight: Any
    gradient: Any
    block: Any
    kept_block: Any


@triton.jit
@no_type_check
def f32(x):
    """A scalar argument as float32, whatever it came as."""
    return tl.full([], x, tl.float32)


@triton.jit
@no_type_check
def transformed(x, rows):
    """Logits of products."""
    if rows.transform == SCALED:
        x = x * rows.scale
    if rows.transform == CAPPED:
        x = rows.cap * (1 - 2 / (exp(x * (2 * rows.scale)) + 1))  # tanh
    return x


@triton.jit
@no_type_check
def through_transform(grad, z, rows):
    """Gradient with respect to products, from that with respect to logits."""
    if rows.transform == SCALED:
        grad = grad * rows.scale
    if rows.transform == CAPPED:
        tanh = z / rows.cap
        grad = grad * tl.where(z > LOWEST, rows.cap * rows.scale * (1 - tanh * tanh), 0.0)
    return grad


@triton.jit
@no_type_check
def read(rows, row, cols, vocabulary, holes: tl.constexpr, masked: tl.constexpr):
    """Logits of a block in float32; -inf beyond the vocabulary, and in holes.

    A hole is a place that `sparse_rows` has set to -inf.
    """
    start = rows.start + row * rows.pitch
    if masked:
        x = tl.load(start + cols, mask=cols < rows.length, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(start + cols).to(tl.float32)
    z = transformed(x, rows)
    if holes and rows.transform == CAPPED:
        z = tl.where(x > LOWEST, z, float("-inf"))
    if masked:
        z = tl.where(cols < vocabulary, z, float("-inf"))
    return z


@triton.jit
@no_type_check
def write(rows, row, cols, vocabulary, grad, masked: tl.constexpr):
    """Write a block of the gradient; what pads a row becomes 0."""
    start = rows.start + row * rows.pitch
    grad = grad.to(rows.start.dtype.element_ty)
    if masked:
        grad = tl.where(cols < vocabulary, grad, 0.0).to(rows.start.dtype.element_ty)
        tl.store(start + cols, grad, mask=cols < rows.length)
    else:
        tl.store(start + cols, grad)


@triton.jit
@no_type_check
def inside(x, cols, vocabulary, other: tl.constexpr, masked: tl.constexpr):
    if masked:
        x = tl.where(cols < vocabulary, x, other)
    return x


@triton.jit
@no_type_check
def both_powers(d, inv_t, temperature: tl.constexpr):
    """exp(d / T) and exp(d), with one exponential where T is 1 or 2."""
    e = tl.exp2(d * (inv_t * LOG2E))
    if temperature == 1:
        e1 = e
    elif temperature == 2:
        e1 = e * e
    else:
        e1 = tl.exp2(d * LOG2E)
    return e, e1


@triton.jit
@no_type_check
def outcome(x, top, log_sum, inv_t):
    """Log-probability, at least `FLOOR`, and probability."""
    log = (x - top) * inv_t - log_sum
    return tl.maximum(log, FLOOR, propagate_nan=tl.PropagateNan.ALL), exp(log)


@triton.jit
@no_type_check
def ignore_row(student, row, tokens, vocabulary, flags):
    """A row of weight 0: nothing of it is read, so it may hold anything."""
    tl.store(tokens.soft + row, 0.0)
    tl.store(tokens.hard + row, 0.0)
    if flags.gradient:
        zero = tl.zeros([flags.block], tl.float32)
        for o in range(0, vocabulary, flags.block):
            write(student, row, o + tl.arange(0, flags.block), vocabulary, zero, True)


@triton.jit
@no_type_check
def target_of(student, row, tokens, flags):
    """The target and its logit, before that is overwritten."""
    y, z_y = 0, 0.0
    if flags.has_hard:
        y = tl.load(tokens.targets + row).to(tl.int32)
        x = tl.load(student.start + row * student.pitch + y).to(tl.float32)
        z_y = transformed(x, student)
    return y, z_y
