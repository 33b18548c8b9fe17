"""The kernel for a teacher with K tokens and the tail: top-k, sampled tokens, or none at all.

Formulas and letters as in `dense`. The K + 1 outcomes stay in registers, so there are two passes
over the row.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from limbeck.losses.head.row_kernel.divergences import LOG_SUM, MIXED, TINY, exp
from limbeck.losses.head.row_kernel.memory import (
    FLOOR,
    LOWEST,
    both_powers,
    f32,
    ignore_row,
    outcome,
    read,
    target_of,
    through_transform,
    transformed,
    write,
)


@triton.jit
@no_type_check
def tail_sums(student, row, vocabulary, inv_t, flags):
    """Maximum and sums at T and at 1 of what is left in a row: the tail."""
    span, full = tl.arange(0, flags.block), vocabulary // flags.block * flags.block
    sq, s1 = tl.zeros([flags.block], tl.float32), tl.zeros([flags.block], tl.float32)
    top = f32(LOWEST)
    for masked in tl.static_range(2):
        for o in range(full * masked, full + (vocabulary - full) * masked, flags.block):
            z = read(student, row, o + span, vocabulary, True, masked)
            new = tl.maximum(top, tl.max(z, 0))
            fq, f1 = both_powers(top - new, inv_t, flags.temperature)
            e, e1 = both_powers(z - new, inv_t, flags.temperature)
            sq = sq * fq + e
            if flags.has_hard and flags.temperature != 1:
                s1 = s1 * f1 + e1
            top = new
    return top, tl.sum(sq, 0), tl.sum(s1, 0)


@triton.jit
@no_type_check
def merged_value(logs, probs, kept, c0, c1, divergence):
    """Divergence over K outcomes and the tail, and the number the slopes get as c0."""
    lq, lp, lq_t, lp_t = logs
    q, p, q_t, p_t = probs
    first = c0
    if divergence.kind == MIXED:
        first = f32(1.0)
        rest = tl.where(kept, divergence.value(lq, lp, q, p, 0.0, c1), 0.0)
        rest = tl.sum(rest, 0) + divergence.value(lq_t, lp_t, q_t, p_t, 0.0, c1)
    each = divergence.value(lq, lp, q, p, first, c1)
    tail = divergence.value(lq_t, lp_t, q_t, p_t, first, c1)
    if divergence.kind == LOG_SUM:
        each = tl.where(kept, each, float("-inf"))
        top = tl.maximum(tl.max(each, 0), tail)
        c0 = top + tl.log(tl.sum(exp(each - top), 0) + exp(tail - top))
        value = -c0
    else:
        value = tl.sum(tl.where(kept, each, 0.0), 0) + tail
    if divergence.kind == MIXED:
        c0 = divergence.mix(rest, c0, c1)
        value = c0 * value + (1 - c0) * rest
    return value, c0


@triton.jit
@no_type_check
def take_kept(student, row, teacher, flags):
    """Ids, logits and the teacher's log-probabilities of kept tokens; -inf stays in their places.

    What is left in the row is the tail, so that its sum needs no subtraction and no search.
    """
    k = tl.arange(0, flags.kept_block)
    ids = tl.load(teacher.ids + row * teacher.size + k, mask=k < teacher.size, other=-1)
    kept = ids >= 0
    places = student.start + row * student.pitch + ids
    x = tl.load(places, mask=kept, other=0.0).to(tl.float32)
    z = tl.where(kept, transformed(x, student), float("-inf"))
    log = teacher.logprobs + row * (teacher.size + 1)
    logp = tl.maximum(tl.load(log + k, mask=kept, other=FLOOR).to(tl.float32), FLOOR)
    logp_t = tl.maximum(tl.load(log + teacher.size).to(tl.float32), FLOOR)
    hole = tl.full([flags.kept_block], float("-inf"), tl.float32)
    hole = hole.to(student.start.dtype.element_ty)
    tl.debug_barrier()  # all threads have read: a kept token may be the target
    tl.store(places, hole, mask=kept)
    tl.debug_barrier()  # all threads see what was written
    return ids, kept, z, logp, logp_t


@triton.jit
@no_type_check
def sparse_rows(student, teacher, tokens, factors, divergence, flags):
    """Loss and gradient of a row whose teacher has K tokens and the rest in one."""
    row = tl.program_id(0).to(tl.int64)
    vocabulary, inv_t = factors.vocabulary, f32(factors.inv_t)
    soft, hard = f32(factors.soft), f32(factors.hard)
    c0, c1 = f32(factors.c0), f32(factors.c1)
    if flags.has_weight:
        weight = tl.load(tokens.weights + row).to(tl.float32)
        if weight == 0:
            ignore_row(student, row, tokens, vocabulary, flags)
            return
        soft *= weight
        hard *= weight
    y, z_y = target_of(student, row, tokens, flags)
    ids, kept, z, logp, logp_t = take_kept(student, row, teacher, flags)
    top, sum_t, tail_1 = tail_sums(student, row, vocabulary, inv_t, flags)
    zm = tl.maximum(tl.maximum(tl.max(z, 0), LOWEST), top)
    e, e1 = both_powers(z - zm, inv_t, flags.temperature)
    f, f1 = both_powers(top - zm, inv_t, flags.temperature)
    sum_q = tl.sum(e, 0) + sum_t * f
    sum_1 = sum_q if flags.temperature == 1 else tl.sum(e1, 0) + tail_1 * f1
    lq = tl.log(sum_q)
    # K + 1 outcomes, all in registers: no further pass over the row for the value.
    logq, q = outcome(z, zm, lq, inv_t)
    logq_t = (top - zm) * inv_t + tl.log(tl.maximum(sum_t, TINY)) - lq
    logq_t = tl.maximum(logq_t, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    q_t, p, p_t = exp(logq_t), exp(logp), exp(logp_t)
    logs, probs = (logq, logp, logq_t, logp_t), (q, p, q_t, p_t)
    value, c0 = merged_value(logs, probs, kept, c0, c1, divergence)
    tl.store(tokens.soft + row, value)
    if flags.has_hard:
        tl.store(tokens.hard + row, tl.log(sum_1) - (z_y - zm))
    if flags.gradient:
        slope = tl.where(kept, divergence.slope(logq, logp, q, p, c0, c1), 0.0)
        slope_t = divergence.slope(logq_t, logp_t, q_t, p_t, c0, c1)
        total = tl.sum(slope, 0) + slope_t
        # The tail's slope is divided in proportion to the student's probabilities, e / sum_t.
        of_tail = soft * (slope_t - q_t * total) / tl.maximum(sum_t, TINY)
        numbers = (y, hard, hard * f1 / sum_1, of_tail, top, inv_t)
        tail_gradient(student, row, vocabulary, numbers, flags)
        grad = soft * (slope - q * total)
        if flags.has_hard:
            grad += hard * (e1 / sum_1 - tl.where(ids == y, 1.0, 0.0))
        grad = through_transform(grad, z, student).to(student.start.dtype.element_ty)
        tl.debug_barrier()  # the loop wrote these places too
        tl.store(student.start + row * student.pitch + ids, grad, mask=kept)


@triton.jit
@no_type_check
def tail_gradient(student, row, vocabulary, numbers, flags):
    """The gradient of all tokens but the kept ones, over the logits."""
    y, hard, of_1, of_tail, top, inv_t = numbers
    span, full = tl.arange(0, flags.block), vocabulary // flags.block * flags.block
    for masked in tl.static_range(2):
        for o in range(full * masked, full + (vocabulary - full) * masked, flags.block):
            cols = o + span
            z = read(student, row, cols, vocabulary, True, masked)
            e, e1 = both_powers(z - top, inv_t, flags.temperature)
            grad = of_tail * e
            if flags.has_hard:
                grad += of_1 * e1 - tl.where(cols == y, hard, 0.0)
            write(student, row, cols, vocabulary, through_transform(grad, z, student), masked)
