"""Calls of the row kernels: tensors and numbers in the order the kernels take them.

Imports Triton; only `body` imports this module, when it is about to use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from limbeck.losses.head.row_kernel.dense import dense_rows
from limbeck.losses.head.row_kernel.divergences import LIKELIHOOD, ROW_DIVERGENCES
from limbeck.losses.head.row_kernel.memory import Factors, Flags, Rows, Sparse, Tokens
from limbeck.losses.head.row_kernel.sparse import sparse_rows
from limbeck.losses.head.workspace import padded_to
from limbeck.losses.logit_transforms import Elementwise

BLOCK, WARPS = 2048, 8
"""Columns of a block and warps of a program: 8 elements a thread, so that a bfloat16 access is 16
bytes wide. Three programs fit on a multiprocessor of an H200 by their registers."""


class DenseTeacher(NamedTuple):
    """A chunk of the teacher's logits, and the transform still to be applied."""

    logits: Tensor
    transform: Elementwise


class SparseTeacher(NamedTuple):
    """Ids [n, K], -1 where unused; log-probabilities [n, K + 1] with the tail's last."""

    ids: Tensor
    logprobs: Tensor
    are_shares: bool
    """Whether they are estimates, whose divergence is the cross-entropy under them."""


@dataclass(frozen=True)
class RowTask:
    """One chunk's work.

    Attributes:
        logits: The student's products [n, V]; rows padded to a multiple of 16 are ours up to there.
        transform: Makes logits of them.
        teacher: In either form.
        targets: [n], int64; None without a cross-entropy.
        weights: [n] or None.
        divergence: Name, and values of its options.
        temperature: Of the divergence.
        soft_weight: Weight of temperature squared times the divergence.
        hard_weight: Weight of the cross-entropy.
        gradient: Whether the logits become the gradient; else their values are undefined.
    """

    logits: Tensor
    transform: Elementwise
    teacher: DenseTeacher | SparseTeacher
    targets: Tensor | None
    weights: Tensor | None
    divergence: tuple[str, tuple[float, ...]]
    temperature: float
    soft_weight: float
    hard_weight: float
    gradient: bool


class Call(NamedTuple):
    """A kernel, its grid and its arguments."""

    kernel: Any
    num_rows: int
    arguments: tuple[Any, ...]

    def run(self) -> None:
        """Run the kernel on the device of its tensors."""
        with torch.cuda.device_of(self.arguments[0].start):
            self.kernel[(self.num_rows,)](*self.arguments, num_warps=WARPS)


def kernel_call(task: RowTask, soft: Tensor, hard: Tensor) -> Call:
    """The call that writes each row's divergence and cross-entropy, unweighted, and the gradient.

    Args:
        task: At least one row.
        soft: [n], float32; 0 where the weight is 0, as in `hard`.
        hard: [n], float32; not written without targets.
    """
    count, vocabulary = task.logits.shape
    name, options = task.divergence
    c0, c1 = (*options, 0.0, 0.0)[:2]
    temperature = task.temperature
    factors = Factors(
        vocabulary, 1 / temperature, task.soft_weight * temperature, task.hard_weight, c0, c1
    )
    tokens = Tokens(task.targets, task.weights, soft, hard)
    kept = 0 if isinstance(task.teacher, DenseTeacher) else task.teacher.ids.shape[1]
    flags = Flags(
        *map(
            tl.constexpr,
            (
                int(temperature) if temperature in {1, 2} else 0,
                task.targets is not None,
                task.weights is not None,
                task.gradient,
                min(BLOCK, max(16, triton.next_power_of_2(vocabulary))),
                triton.next_power_of_2(max(kept, 1)),
            ),
        )
    )
    student = rows_of(task.logits, task.transform)
    if isinstance(task.teacher, DenseTeacher):
        rows = rows_of(*task.teacher)
        arguments = student, rows, tokens, factors, ROW_DIVERGENCES[name], flags
        return Call(dense_rows, count, arguments)
    sparse = Sparse(task.teacher.ids.contiguous(), task.teacher.logprobs.contiguous(), kept)
    divergence = LIKELIHOOD if task.teacher.are_shares else ROW_DIVERGENCES[name]
    return Call(sparse_rows, count, (student, sparse, tokens, factors, divergence, flags))


def rows_of(logits: Tensor, transform: Elementwise) -> Rows:
    """Logits as an argument of a kernel."""
    pitch, kind = logits.stride(0), tl.constexpr(transform.kind)
    return Rows(logits, pitch, readable(logits), transform.scale, transform.cap, kind)


def readable(logits: Tensor) -> int:
    """Columns a kernel may read: V rounded up to 16 where rows start at a multiple of 16."""
    pitch, wide = logits.stride(0), padded_to(logits.shape[1])
    starts_at_16 = pitch % 16 == 0 and logits.data_ptr() % (16 * logits.element_size()) == 0
    return wide if starts_at_16 and wide <= pitch else logits.shape[1]
