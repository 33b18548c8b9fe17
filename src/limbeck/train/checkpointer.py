"""When a run's checkpoints are written, published and removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from limbeck.distributed import Saving, begin_saving, prune, started, together
from limbeck.distributed.checkpoints import Optimizers
from limbeck.train.setup import TrainSetup


class Checkpointer:
    """Saves a run, before it continues or meanwhile, as `checkpoint.asynchronous` says.

    At most one checkpoint is being written. Every rank calls each method, in the same step.

    Attributes:
        saved_at: Step of the newest checkpoint that was begun or resumed from.
    """

    def __init__(self, setup: TrainSetup, optimizers: Optimizers) -> None:
        self.saved_at: int | None = None
        self._setup = setup
        self._optimizers = optimizers
        self._saving: Saving | None = None
        self._protected: Collection[int] = ()
        self._pruning: Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank has more to write; any method but this may be called meanwhile."""
        return self._saving is not None and not self._saving.is_written

    def save(self, step: int, facts: Mapping[str, Any], protected: Collection[int]) -> None:
        """Begin a checkpoint, after the one before is published.

        Args:
            protected: Steps whose checkpoints stay when old ones are removed.

        Raises:
            StorageError: This one or the one before could not be written.
        """
        setup, asynchronous = self._setup, self._setup.checkpoint.asynchronous
        self.finish()
        self._saving = begin_saving(
            setup.checkpoints,
            step,
            setup.distiller,
            self._optimizers,
            facts,
            setup.world,
            in_background=asynchronous,
        )
        self._protected = protected
        self.saved_at = step
        if not asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, publish it, and remove old ones.

        Raises:
            StorageError: It could not be written on some rank; older checkpoints are intact.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        self._prune(saving.finish())

    def finish_all(self) -> None:
        """As `finish`, and wait until old checkpoints are removed."""
        self.finish()
        together(self._wait_for_pruning, self._setup.world)

    def close(self) -> None:
        """Let threads end; what is not published by now never is. A rank may call it alone."""
        if self._saving is not None:
            self._saving.abandon()
        if self._pruning is not None:
            self._pruning.exception()

    def _prune(self, newest: Path) -> None:
        """Remove old checkpoints on rank 0, which first reads the newest again."""
        setup, protected = self._setup, self._protected

        def remove() -> None:
            prune(setup.checkpoints, newest, setup.checkpoint.keep, protected)

        def begin() -> None:
            self._wait_for_pruning()
            self._pruning = started(remove, in_background=setup.checkpoint.asynchronous)
            if not setup.checkpoint.asynchronous:
                self._wait_for_pruning()

        together(begin, setup.world, main_only=True)

    def _wait_for_pruning(self) -> None:
        if self._pruning is not None:
            pruning, self._pruning = self._pruning, None
            pruning.result()
