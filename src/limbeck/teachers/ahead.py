"""Work on the windows of batches before the batches are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from limbeck.batch import Batch
from limbeck.store import Sample

T = TypeVar("T")


class Ahead(Generic[T]):
    """Answers to windows, computed in the background from the moment the windows are announced."""

    def __init__(
        self, start: Callable[[Sample], Future[T]], *, most_positions: int | None = None
    ) -> None:
        """
        Args:
            start: Starts the work on one window.
            most_positions: Positions in progress or waiting to be read, at most; the windows
                announced beyond them start when others have been read. None is no limit.
        """
        self._start, self._most_positions = start, most_positions
        self._announced: dict[bytes, Sample] = {}
        self._started: dict[bytes, tuple[int, Future[T]]] = {}
        self._positions = 0

    def __len__(self) -> int:
        """Windows that were announced and not read."""
        return len(self._announced) + len(self._started)

    def announce(self, batches: Sequence[Batch]) -> None:
        """Start on the windows of these batches, in their order."""
        for batch in batches:
            for sample in samples_of(batch):
                if (key := sample.key) not in self._started:
                    self._announced.setdefault(key, sample)
        self._fill()

    def take(self, batch: Batch) -> list[tuple[Sample, T]]:
        """The windows of a batch with their answers; waits for those that are not ready."""
        samples = list(samples_of(batch))
        futures = [self._taken(sample) for sample in samples]
        self._fill()
        return [(s, future.result()) for s, future in zip(samples, futures, strict=True)]

    def _taken(self, sample: Sample) -> Future[T]:
        key = sample.key
        if key not in self._started:
            self._announced.pop(key, None)
            return self._start(sample)
        length, future = self._started.pop(key)
        self._positions -= length
        return future

    def _fill(self) -> None:
        while self._announced and (
            self._most_positions is None or self._positions < self._most_positions
        ):
            key = next(iter(self._announced))
            sample = self._announced.pop(key)
            length = len(sample.scored)
            self._started[key] = length, self._start(sample)
            self._positions += length


def samples_of(batch: Batch) -> Iterator[Sample]:
    """The windows of a batch that have scored positions, in the order of those positions."""
    for _, _, window in batch.scored_windows():
        yield Sample(window.tokens.astype(np.int32), window.scored.copy())
