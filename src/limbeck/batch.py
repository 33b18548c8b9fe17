"""A batch of token sequences, with the next-token shift already done.

Position `t` reads `input_ids[:, t]` and predicts `target_ids[:, t]`. The shift happens once, where
batches are made; no other module slices `[:-1]` or `[1:]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

MIN_WIDTH = 2
"""Positions of a batch of no rows: the shortest a model can read as a sequence."""


class Window(NamedTuple):
    """L + 1 tokens of a document: position t reads token t and predicts token t + 1.

    Attributes:
        scored: Which of the L positions count.
        document: The document's index in the data set.
        weight: What multiplies the objective at its positions, or at each of them.
    """

    tokens: Int[np.ndarray, " L1"]
    scored: Bool[np.ndarray, " L"]
    document: int
    weight: float | Float[np.ndarray, " L"] = 1.0


@dataclass(frozen=True)
class Batch:
    """B rows of T positions, of which N are scored; a row holds one or more documents.

    Attributes:
        input_ids: Token ids the models read.
        target_ids: Token id each position must predict.
        scored: True where a position counts towards the objective. Padding, prompts and positions
            whose target lies in another document are False.
        position_ids: Index of each token in its segment, from 0. Each 0 starts a new segment, and
            attention does not cross its start; padding is a segment of its own.
        document_ids: Index, in the data set, of the document each position belongs to; -1 for
            padding.
        weights: What multiplies every term of the objective at a position; None is 1 everywhere.
        host: The same batch in host memory, of a batch that was moved to a device; reading it does
            not wait for the device.
    """

    input_ids: Int[Tensor, "B T"]
    target_ids: Int[Tensor, "B T"]
    scored: Bool[Tensor, "B T"]
    position_ids: Int[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"]
    weights: Float[Tensor, "B T"] | None = None
    host: Batch | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_tokens(
        cls, tokens: Int[Tensor, "B T1"], scored: Bool[Tensor, "B T"] | None = None
    ) -> Batch:
        """Rows of equal length, one document each, T + 1 tokens making T positions."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        rows, length = inputs.shape
        everything = torch.ones_like(inputs, dtype=torch.bool)
        return cls(
            input_ids=inputs,
            target_ids=targets,
            scored=everything if scored is None else scored,
            position_ids=torch.arange(length, device=tokens.device).expand(rows, length),
            document_ids=torch.arange(rows, device=tokens.device)[:, None].expand(rows, length),
        )

    @classmethod
    def packed(cls, rows: Sequence[Sequence[Window]], *, weighted: bool = False) -> Batch:
        """Rows of windows that do not attend to each other, padded to the longest row.

        Padding is token 0, which every model knows; it is never scored. No rows give one row of
        padding, so that a rank without work can still take part.
        """
        ends = [np.cumsum([0, *(len(window.scored) for window in row)]).tolist() for row in rows]
        shape = (max(len(rows), 1), max([MIN_WIDTH, *(each[-1] for each in ends)]))
        inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        scored = np.zeros(shape, dtype=np.bool_)
        positions = np.tile(np.arange(shape[1]), (shape[0], 1))
        documents = np.full(shape, -1, dtype=np.int64)
        weights = np.ones(shape, dtype=np.float32)
        for index, (row, borders) in enumerate(zip(rows, ends, strict=True)):
            for window, (start, stop) in zip(row, itertools.pairwise(borders), strict=True):
                place = (index, slice(start, stop))
                inputs[place], targets[place] = window.tokens[:-1], window.tokens[1:]
                scored[place], documents[place] = window.scored, window.document
                positions[place] -= start
                weights[place] = window.weight
            positions[index, borders[-1] :] -= borders[-1]
        return cls(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(scored),
            torch.from_numpy(positions),
            torch.from_numpy(documents),
            torch.from_numpy(weights) if weighted else None,
        )

    def __len__(self) -> int:
        """B."""
        return len(self.input_ids)

    def part(self, rows: slice, positions: slice = slice(None)) -> Batch:
        """Some of the rows; they may be cut at their end only."""
        host = None if self.host is None else self.host.part(rows, positions)
        return self._changed(lambda tensor: tensor[rows, positions], host)

    @property
    def on_host(self) -> Batch:
        """The batch in host memory; only one that was made on a device has to be copied."""
        if self.host is not None:
            return self.host
        cpu = torch.device("cpu")
        return self if self.input_ids.device == cpu else self._changed(lambda t: t.to(cpu), None)

    @cached_property
    def scored_index(self) -> Int[Tensor, " N"]:
        """Where the scored positions are among the B T, in row-major order.

        Selecting by it does not wait for the device, as selecting by `scored` does.
        """
        index = self.on_host.scored.flatten().nonzero().squeeze(-1)
        return sent(index, self.input_ids.device)

    @cached_property
    def segment_borders(self) -> Int[Tensor, " S1"]:
        """Starts of the S segments among the B T positions, and B T, int32.

        Empty if no row has a second segment but for padding at its end. Causal attention keeps
        those apart by itself.
        """
        host = self.on_host
        # In a dry run every such question is answered with True: its rows hold one document each.
        if ((host.position_ids > 0) | (host.document_ids < 0))[:, 1:].all():
            return torch.empty(0, dtype=torch.int32, device=self.input_ids.device)
        starts = host._starts().flatten().nonzero().squeeze(-1)
        borders = torch.cat([starts, starts.new_tensor([host.scored.numel()])])
        return sent(borders.to(torch.int32), self.input_ids.device)

    def scored_rows(self, values: Shaped[Tensor, "B T *D"]) -> Shaped[Tensor, " N *D"]:
        """Values at the scored positions, in row-major order."""
        return values.flatten(0, 1).index_select(0, self.scored_index)

    def num_scored(self) -> Int[Tensor, ""]:
        """N, as a tensor so that counting does not wait for the device."""
        return self.scored.sum()

    def targets(self) -> Int[Tensor, " N"]:
        """Target ids of the scored positions."""
        return self.scored_rows(self.target_ids)

    def documents(self) -> Int[Tensor, " N"]:
        """Document index of the scored positions."""
        return self.scored_rows(self.document_ids)

    def token_weights(self) -> Float[Tensor, " N"] | None:
        """Weights of the scored positions."""
        return None if self.weights is None else self.scored_rows(self.weights)

    def segments(self) -> Int[Tensor, " N"]:
        """Segment number of each scored position, non-decreasing; in host memory.

        A segment is a document, or the part of one that lies in a row.
        """
        host = self.on_host
        starts = host._starts()
        return host.scored_rows(starts.flatten().cumsum(0).view_as(starts))

    def scored_windows(self) -> Iterator[tuple[int, slice, Window]]:
        """Row, positions and content of each segment that has scored positions, in their order."""
        host = self.on_host
        inputs, targets, scored, documents = (
            each.numpy()
            for each in (host.input_ids, host.target_ids, host.scored, host.document_ids)
        )
        for row, starts in enumerate(host._starts().numpy()):
            ends = [*starts.nonzero()[0].tolist(), len(starts)]
            for place in map(slice, ends, ends[1:]):
                if scored[row, place].any():
                    tokens = np.append(inputs[row, place], targets[row, place.stop - 1])
                    number = int(documents[row, place.start])
                    yield row, place, Window(tokens, scored[row, place], number)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; the host does not wait until it is there."""
        return self._changed(lambda tensor: sent(tensor, device), self.on_host)

    def _starts(self) -> Bool[Tensor, "B T"]:
        starts = self.position_ids == 0
        starts[:, :1] = True
        return starts

    def _changed(self, change: Callable[[Tensor], Tensor], host: Batch | None) -> Batch:
        return Batch(
            change(self.input_ids),
            change(self.target_ids),
            change(self.scored),
            change(self.position_ids),
            change(self.document_ids),
            None if self.weights is None else change(self.weights),
            host,
        )


def sent(tensor: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """A tensor on a device; from host memory it is copied without waiting, pinned for CUDA."""
    if tensor.device.type != "cpu":
        return tensor.to(device)
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
