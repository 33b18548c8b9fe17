"""A batch of student tokens as another tokenizer's tokens of the same text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from limbeck.batch import Batch
from limbeck.data.text_data import MIN_WIDTH
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


class Segment(NamedTuple):
    """A segment in the teacher's tokens.

    Attributes:
        ids: The tokens.
        scored: Those after which the teacher's distribution is read.
    """

    ids: Int64[np.ndarray, " u"]
    scored: Bool[np.ndarray, " u"]


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
    rows: list[list[Segment]] = [[] for _ in range(max(len(scored), 1))]
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
            rows[stretch.row].append(Segment(aligned.teacher_ids, mask))
            positions.append(number[place][chosen])
    return Rereading(packed(rows), torch.from_numpy(np.concatenate(positions)))


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


def packed(rows: list[list[Segment]]) -> Batch:
    """Rows of segments as a batch."""
    width = max(MIN_WIDTH, *(sum(len(segment.ids) for segment in row) for row in rows))
    shape = (len(rows), width)
    inputs, targets, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    scored, documents = np.zeros(shape, dtype=np.bool_), np.full(shape, -1, dtype=np.int64)
    for index, row in enumerate(rows):
        at = 0
        for number, (ids, mask) in enumerate(row):
            place = (index, slice(at, at + len(ids)))
            inputs[place], scored[place], documents[place] = ids, mask, number
            targets[index, at : at + len(ids) - 1] = ids[1:]
            positions[place] = np.arange(len(ids))
            at += len(ids)
        positions[index, at:] = np.arange(width - at)
    arrays = (inputs, targets, scored, positions, documents)
    return Batch(*(torch.from_numpy(each) for each in arrays))
