"""A batch of student tokens as another tokenizer's tokens of the same text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from limbeck.batch import Batch, Window
from limbeck.tokenizers import Aligner, Alignment


class Stretch(NamedTuple):
    """A segment of a batch: positions `start` to `end` of a row, and the tokens they read.

    Attributes:
        row: Of the batch.
        start: Its first position.
        end: One past its last.
        tokens: The tokens read, and the last target.
    """

    row: int
    start: int
    end: int
    tokens: list[int]


class Rereading(NamedTuple):
    """A batch in a teacher's own tokens.

    Attributes:
        batch: For the teacher; a position is scored where both tokenizers stand at one byte.
        positions: Of those, among the N scored positions of the student's batch.
    """

    batch: Batch
    positions: Int[Tensor, " n"]


def reread(batch: Batch, aligner: Aligner) -> Rereading:
    """A batch's text in the teacher's tokens.

    A segment that cannot be aligned is left out: its positions have no teacher. The teacher's
    batch is on the CPU and has at least one row, so that every rank enters its forward pass.
    """
    stretches = list(stretches_of(batch))
    scored = batch.scored.cpu().numpy()
    number = scored.reshape(-1).cumsum().reshape(scored.shape) - 1
    rows: list[list[Window]] = [[] for _ in range(max(len(scored), 1))]
    positions: list[Int64[np.ndarray, " n"]] = [np.empty(0, dtype=np.int64)]
    for stretch, aligned in zip(
        stretches, aligner.align([each.tokens for each in stretches]), strict=True
    ):
        if isinstance(aligned, Alignment):
            place = (stretch.row, slice(stretch.start, stretch.end))
            standing = aligned.standing[:-1]
            chosen = scored[place] & (standing >= 0)
            mask = np.zeros(len(aligned.teacher_ids), dtype=np.bool_)
            mask[standing[chosen]] = True
            row = rows[stretch.row]
            tokens = np.append(aligned.teacher_ids, 0)  # the last target is not read
            row.append(Window(tokens, mask, len(row)))
            positions.append(number[place][chosen])
    return Rereading(Batch.packed(rows), torch.from_numpy(np.concatenate(positions)))


def stretches_of(batch: Batch) -> Iterator[Stretch]:
    """The segments of a batch that have scored positions, in the order of those positions."""
    inputs, targets = batch.input_ids.cpu().numpy(), batch.target_ids.cpu().numpy()
    scored, places = batch.scored.cpu().numpy(), batch.position_ids.cpu().numpy()
    for row in range(len(inputs)):
        starts = [*(places[row] == 0).nonzero()[0].tolist(), inputs.shape[1]]
        for start, end in itertools.pairwise(starts):
            if scored[row, start:end].any():
                tokens = [*inputs[row, start:end].tolist(), int(targets[row, end - 1])]
                yield Stretch(row, start, end, tokens)
