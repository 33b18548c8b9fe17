"""A batch of student tokens as another tokenizer's tokens of the same text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from limbeck.batch import Batch, Window
from limbeck.tokenizers import Aligner


class Segment(NamedTuple):
    """A segment in the teacher's tokens.

    Attributes:
        standing: Whether the teacher's distribution after a token is read.
        chunk_of: Chunk of the token after each, or -1.
    """

    ids: Int64[np.ndarray, " u"]
    standing: Bool[np.ndarray, " u"]
    chunk_of: Int64[np.ndarray, " u"]

    @property
    def scored(self) -> Bool[np.ndarray, " u"]:
        """Whether anything of the teacher is read after a token."""
        return self.standing | (self.chunk_of >= 0)


class Rereading(NamedTuple):
    """A batch in a teacher's own tokens.

    Attributes:
        batch: For the teacher; M positions are scored, where anything of them is read.
        positions: The n of the N scored positions of the student's batch at which both tokenizers
            stand at one byte.
        rows: The same among the M.
        chunk_of: Chunk of each of the N targets; C where it is in none.
        teacher_chunk_of: Chunk of each of the M targets.
        num_chunks: C.
    """

    batch: Batch
    positions: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    chunk_of: Int[Tensor, " N"]
    teacher_chunk_of: Int[Tensor, " M"]
    num_chunks: int


def reread(batch: Batch, aligner: Aligner, *, likelihoods: bool = False) -> Rereading:
    """A batch's text in the teacher's tokens; all on the CPU.

    A segment that cannot be aligned is left out: its positions have no teacher. The teacher's
    batch has at least one row, so that every rank enters its forward pass.

    Args:
        likelihoods: Whether the text's chunks are wanted; there are none otherwise.
    """
    windows = list(batch.scored_windows())
    scored = batch.on_host.scored.numpy()
    number = scored.reshape(-1).cumsum().reshape(scored.shape) - 1
    rows: list[list[Segment]] = [[] for _ in range(max(len(scored), 1))]
    positions: list[Int64[np.ndarray, " n"]] = [np.empty(0, dtype=np.int64)]
    chunk_of, num_chunks = np.full(int(scored.sum()), -1), 0
    texts = [window.tokens.tolist() for _, _, window in windows]
    for (row, columns, _), aligned in zip(windows, aligner.align(texts), strict=True):
        if isinstance(aligned, str):
            continue
        place = row, columns
        standing, mine = aligned.standing[:-1], scored[place]
        chosen = mine & (standing >= 0)
        mask = np.zeros(len(aligned.teacher_ids), dtype=np.bool_)
        mask[standing[chosen]] = True
        positions.append(number[place][chosen])
        own_chunks = np.full(len(aligned.teacher_ids), -1)
        if likelihoods:
            chunks = aligned.chunks(np.concatenate([[False], mine]))
            ours, theirs = (
                np.where(of[1:] < 0, -1, of[1:] + num_chunks)
                for of in (chunks.student, chunks.teacher)
            )
            chunk_of[number[place][mine]] = ours[mine]
            own_chunks[: len(theirs)] = theirs
            num_chunks += chunks.num_chunks
        rows[row].append(Segment(aligned.teacher_ids, mask, own_chunks))
    packed_batch, is_standing, teacher_chunk_of = packed(rows)
    return Rereading(
        packed_batch,
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(is_standing.nonzero()[0]),
        torch.from_numpy(np.where(chunk_of < 0, num_chunks, chunk_of)),
        torch.from_numpy(np.where(teacher_chunk_of < 0, num_chunks, teacher_chunk_of)),
        num_chunks,
    )


def packed(
    rows: list[list[Segment]],
) -> tuple[Batch, Bool[np.ndarray, " M"], Int64[np.ndarray, " M"]]:
    """Rows of segments as a batch.

    Also, for each of its M scored positions, whether both tokenizers stand there, and the chunk.
    """
    windows = [
        # The last token predicts nothing that is read: its target may be any.
        [Window(np.append(each.ids, 0), each.scored, number) for number, each in enumerate(row)]
        for row in rows
    ]
    segments = [segment for row in rows for segment in row]
    standing = [np.empty(0, dtype=np.bool_), *(each.standing[each.scored] for each in segments)]
    chunk_of = [np.empty(0, dtype=np.int64), *(each.chunk_of[each.scored] for each in segments)]
    return Batch.packed(windows), np.concatenate(standing), np.concatenate(chunk_of)
