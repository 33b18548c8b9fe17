"""Bugs in the row kernels.

Not here: places of rows in 32 bits, which `a_row_beyond_two_to_the_31_elements` catches by a crash.
"""

from __future__ import annotations

from mutation_table.places import DENSE_ROWS, ROW_MEMORY, ROWS, SPARSE_ROWS, Mutation

ROW_KERNEL = (
    Mutation(
        "the kernel does not clamp log-probabilities of minus infinity",
        ROW_MEMORY,
        "    return tl.maximum(log, FLOOR, propagate_nan=tl.PropagateNan.ALL), exp(log)\n",
        "    return log, exp(log)\n",
        ROWS + "extreme_logits",
    ),
    Mutation(
        "the kernel's online sums clamp at another floor than its gradient",
        DENSE_ROWS,
        "(least - zm) * inv_t - lq < FLOOR",
        "(least - zm) * inv_t - lq < 9 * FLOOR",
        ROWS + "extreme_logits",
    ),
    Mutation(
        "the kernel's online sum of gaps is not rescaled when the maximum changes",
        DENSE_ROWS,
        "gaps = (gaps + sp * shift) * fp +",
        "gaps = gaps * fp +",
        ROWS + "whole_logits",
    ),
    Mutation(
        "the kernel divides softmax(z / 2) squared by the wrong sum",
        DENSE_ROWS,
        "of_1 *= sum_q * sum_q",
        "of_1 *= sum_q",
        ROWS + "whole_logits",
    ),
    Mutation(
        "the kernel writes a gradient into the padding of a row",
        ROW_MEMORY,
        "grad = tl.where(cols < vocabulary, grad, 0.0).to(",
        "grad = tl.where(cols < vocabulary, grad, 1.0).to(",
        ROWS + "the_padding_of_a_row_becomes_zero_and_nothing_beyond_it_changes",
    ),
    Mutation(
        "the kernel counts the first kept token in the tail too",
        SPARSE_ROWS,
        "tl.store(places, hole, mask=kept)",
        "tl.store(places, hole, mask=kept & (k > 0))",
        ROWS + "kept_tokens_and_the_tail",
    ),
    Mutation(
        "the kernel's gradient lacks the derivative of the soft-cap",
        ROW_MEMORY,
        "rows.cap * rows.scale * (1 - tanh * tanh)",
        "rows.cap * rows.scale",
        ROWS + "logit_transforms",
    ),
    Mutation(
        "the kernel's clamp turns NaN into a number",
        ROW_MEMORY,
        "    return tl.maximum(log, FLOOR, propagate_nan=tl.PropagateNan.ALL), exp(log)\n",
        "    return tl.where(log > FLOOR, log, FLOOR), tl.where(log > FLOOR, exp(log), 0.0)\n",
        ROWS + "a_nan_logit_gives_a_nan_loss",
    ),
    Mutation(
        "the kernel reads rows of weight 0",
        SPARSE_ROWS,
        "        if weight == 0:\n",
        "        if weight < 0:\n",
        ROWS + "a_row_of_weight_zero_is_not_read",
    ),
)
