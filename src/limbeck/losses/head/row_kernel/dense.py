"""The kernel for a teacher with logits over the whole vocabulary.

One program a row. With q = softmax(z / T) the student, p the teacher and g_i the derivative of the
divergence with respect to log q_i (up to a multiple of q) and G its sum, the gradient is

    weight * (soft (g_i - q_i G) + hard (softmax(z)_i - [i = target])),

`soft` the divergence's weight times T and `hard` the cross-entropy's. Two passes over the row
suffice for either KL: online sums, then the gradient. Others take one in between for the sums that
need normalised probabilities. All arithmetic is float32. Differences are taken before they are
divided by T, so large logits lose nothing: log q = (z - max z) / T - log sum.

Letters: z and w are the student's and the teacher's logits, `e` exponentials.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from limbeck.losses.head.row_kernel.divergences import (
    FORWARD,
    LOG2E,
    LOG_SUM,
    MIXED,
    REVERSE,
    SUM,
    exp,
)
from limbeck.losses.head.row_kernel.memory import (
    FLOOR,
    LOWEST,
    both_powers,
    f32,
    ignore_row,
    inside,
    outcome,
    read,
    target_of,
    through_transform,
    write,
)


@triton.jit
@no_type_check
def online_sums(student, teacher, row, vocabulary, inv_t, divergence, flags):
    """Pass 1: maxima and sums of both rows, and what makes the value of either KL.

    Maxima are scalars, one reduction a block; sums stay vectors until the end. `gaps` is the sum of
    e * gap, shifted with the maxima. `least` finds rows that touch the floor, which it cannot see.
    """
    span, full = tl.arange(0, flags.block), vocabulary // flags.block * flags.block
    zm, wm = f32(LOWEST), f32(LOWEST)
    sq, sp = tl.zeros([flags.block], tl.float32), tl.zeros([flags.block], tl.float32)
    s1, gaps = tl.zeros([flags.block], tl.float32), tl.zeros([flags.block], tl.float32)
    least = tl.full([flags.block], float("inf"), tl.float32)
    for masked in tl.static_range(2):  # whole blocks, then what is left
        for o in range(full * masked, full + (vocabulary - full) * masked, flags.block):
            cols = o + span
            z = read(student, row, cols, vocabulary, False, masked)
            w = read(teacher, row, cols, vocabulary, False, masked)
            zn, wn = tl.maximum(zm, tl.max(z, 0)), tl.maximum(wm, tl.max(w, 0))
            fq, f1 = both_powers(zm - zn, inv_t, flags.temperature)
            fp = tl.exp2((wm - wn) * (inv_t * LOG2E))
            e, e1 = both_powers(z - zn, inv_t, flags.temperature)
            ep = tl.exp2((w - wn) * (inv_t * LOG2E))
            shift, gap = (wm - wn) - (zm - zn), (w - wn) - (z - zn)
            if divergence.kind == FORWARD:
                gaps = (gaps + sp * shift) * fp + tl.where(ep > 0, ep * gap, 0.0)
                least = tl.minimum(least, inside(z, cols, vocabulary, float("inf"), masked))
            if divergence.kind == REVERSE:
                gaps = (gaps - sq * shift) * fq - tl.where(e > 0, e * gap, 0.0)
                least = tl.minimum(least, inside(w, cols, vocabulary, float("inf"), masked))
            sq, sp = sq * fq + e, sp * fp + ep
            if flags.has_hard and flags.temperature != 1:
                s1 = s1 * f1 + e1
            zm, wm = zn, wn
    sum_q = tl.sum(sq, 0)
    sum_1 = sum_q if flags.temperature == 1 else tl.sum(s1, 0)
    return zm, wm, sum_q, tl.sum(sp, 0), sum_1, tl.sum(gaps, 0), tl.min(least, 0)


@triton.jit
@no_type_check
def normalised_sums(student, teacher, row, stats, factors, divergence, flags):
    """Pass 2: value, sum of slopes, and the number the slopes of pass 3 get as c0."""
    zm, lq, wm, lp = stats
    vocabulary, inv_t = factors.vocabulary, f32(factors.inv_t)
    c0, c1 = f32(factors.c0), f32(factors.c1)
    span, full = tl.arange(0, flags.block), vocabulary // flags.block * flags.block
    values, slopes = tl.zeros([flags.block], tl.float32), tl.zeros([flags.block], tl.float32)
    others, turned = tl.zeros([flags.block], tl.float32), tl.zeros([flags.block], tl.float32)
    top = f32(LOWEST)
    for masked in tl.static_range(2):
        for o in range(full * masked, full + (vocabulary - full) * masked, flags.block):
            cols = o + span
            z = read(student, row, cols, vocabulary, False, masked)
            w = read(teacher, row, cols, vocabulary, False, masked)
            logq, q = outcome(z, zm, lq, inv_t)
            logp, p = outcome(w, wm, lp, inv_t)
            if divergence.kind == LOG_SUM:
                log = divergence.value(logq, logp, q, p, c0, c1)
                log = inside(log, cols, vocabulary, float("-inf"), masked)
                new = tl.maximum(top, tl.max(log, 0))
                slope = divergence.slope(logq, logp, q, p, new, c1)
                values = values * exp(top - new) + exp(log - new)
                slopes = slopes * exp(top - new) + inside(slope, cols, vocabulary, 0.0, masked)
                top = new
            else:
                first = c0
                if divergence.kind == MIXED:
                    first = f32(1.0)
                    value = divergence.value(logq, logp, q, p, 0.0, c1)
                    slope = divergence.slope(logq, logp, q, p, 0.0, c1)
                    others += inside(value, cols, vocabulary, 0.0, masked)
                    turned += inside(slope, cols, vocabulary, 0.0, masked)
                value = divergence.value(logq, logp, q, p, first, c1)
                values += inside(value, cols, vocabulary, 0.0, masked)
                if divergence.kind == SUM or divergence.kind == MIXED:  # noqa: PLR1714
                    slope = divergence.slope(logq, logp, q, p, first, c1)
                    slopes += inside(slope, cols, vocabulary, 0.0, masked)
    value, total = tl.sum(values, 0), tl.sum(slopes, 0)
    if divergence.kind == LOG_SUM:
        c0 = top + tl.log(value)
        value, total = -c0, total / value
    if divergence.kind == MIXED:
        rest = tl.sum(others, 0)
        c0 = divergence.mix(rest, c0, c1)
        value = c0 * value + (1 - c0) * rest
        total = c0 * total + (1 - c0) * tl.sum(turned, 0)
    return value, total, c0


@triton.jit
@no_type_check
def dense_rows(student, teacher, tokens, factors, divergence, flags):
    """Loss and gradient of a row whose teacher has logits over the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)  # row * pitch passes 2^31
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
    zm, wm, sum_q, sum_p, sum_1, gaps, least = online_sums(
        student, teacher, row, vocabulary, inv_t, divergence, flags
    )
    lq, lp = tl.log(sum_q), tl.log(sum_p)
    stats = (zm, lq, wm, lp)
    if divergence.kind == FORWARD:
        value, total = gaps / sum_p * inv_t - lp + lq, f32(-1.0)
        if (least - zm) * inv_t - lq < FLOOR:  # a scalar branch: whole programs skip the pass
            value, _, _ = normalised_sums(student, teacher, row, stats, factors, divergence, flags)
    elif divergence.kind == REVERSE:
        value = gaps / sum_q * inv_t - lq + lp
        if (least - wm) * inv_t - lp < FLOOR:
            value, _, _ = normalised_sums(student, teacher, row, stats, factors, divergence, flags)
        total = value
    else:
        value, total, c0 = normalised_sums(student, teacher, row, stats, factors, divergence, flags)
    tl.store(tokens.soft + row, value)
    y, z_y = target_of(student, row, tokens, flags)
    if flags.has_hard:
        tl.store(tokens.hard + row, tl.log(sum_1) - (z_y - zm))
    if flags.gradient:
        tl.debug_barrier()  # all threads have read the target's logit, which one will overwrite
        # The weight of q, then that of softmax(z), which is q at T = 1 and its square over the
        # sum of squares at T = 2. Divisions are done once a row.
        of_q, of_1 = -soft * total, hard / sum_1
        if flags.has_hard and flags.temperature == 1:
            of_q += hard
        if flags.temperature == 2:
            of_1 *= sum_q * sum_q
        numbers = (vocabulary, inv_t, y, hard, of_1, soft, of_q, c0, c1)
        dense_gradient(student, teacher, row, stats, numbers, divergence, flags)


@triton.jit
@no_type_check
def dense_gradient(student, teacher, row, stats, numbers, divergence, flags):
    """Pass 3: the gradient, over the logits; every block is read before it is written."""
    zm, lq, wm, lp = stats
    vocabulary, inv_t, y, hard, of_1, soft, of_q, c0, c1 = numbers
    span, full = tl.arange(0, flags.block), vocabulary // flags.block * flags.block
    for masked in tl.static_range(2):
        for o in range(full * masked, full + (vocabulary - full) * masked, flags.block):
            cols = o + span
            z = read(student, row, cols, vocabulary, False, masked)
            w = read(teacher, row, cols, vocabulary, False, masked)
            logq, q = outcome(z, zm, lq, inv_t)
            logp, p = outcome(w, wm, lp, inv_t)
            grad = soft * divergence.slope(logq, logp, q, p, c0, c1) + of_q * q
            if flags.has_hard:
                if flags.temperature == 2:
                    grad += of_1 * q * q
                if flags.temperature == 0:
                    grad += of_1 * exp(z - zm)
                grad -= tl.where(cols == y, hard, 0.0)
            write(student, row, cols, vocabulary, through_transform(grad, z, student), masked)
