"""A teacher that spoke once, into a store, and is not there any more."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses import SignalNeeds, TeacherSignal
from limbeck.losses.distributions import LazyLogits, TeacherDistribution
from limbeck.store import Record, Sample, Store
from limbeck.teachers.base import Place, Teacher, teachers


class StoredTeacher(Teacher):
    """What a store holds, looked up window by window; no model is loaded.

    A batch is cut back into the windows it was packed from, so that packing, order, micro-batches
    and ranks may be any. Whoever changes a text, its tokens or what is scored of it gets an error,
    never another text's signal.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        """
        Args:
            store: Whole.
            device: Where the signals are to lie.
        """
        self.store = store
        self._device = device
        head = store.head
        if head is not None:
            bias = None if head.bias is None else head.bias.to(device)
            head = head._replace(weight=head.weight.to(device), bias=bias)
        self._head = head
        self._needs = SignalNeeds(distribution=True)

    @property
    def model(self) -> None:
        """None: only what it said is there."""
        return None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, revision, hash and shape of the model that was recorded, and the store's form."""
        header = self.store.header
        told = {"form": dict(header.form), "tokens": self.store.num_scored, "sha256": header.sha256}
        return {**header.teacher, "recorded": told}

    def ask(self, needs: SignalNeeds) -> None:
        """Agree on what every signal must hold.

        Raises:
            ConfigError: A layer is asked for that was not recorded, or what no store holds.
        """
        if needs.projections:
            raise ConfigError(
                "The objective reads queries, keys and values of the teacher's layers "
                f"{sorted(needs.projections)}, and no store holds those ({self.store.path}). Use "
                "`teacher: {type: online}`, or leave out the term that reads them."
            )
        recorded = self.store.header.layers
        if absent := sorted(needs.layers - set(recorded)):
            raise ConfigError(
                f"The objective reads the teacher's layers {absent}, and the store "
                f"{self.store.path} holds layers {list(recorded) or 'none'}. Record again with "
                "record.layers, or leave out the term that reads them."
            )
        self._needs = needs

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """What was recorded of a batch's windows.

        Raises:
            DataError: A window is not in the store, or its record is damaged.
        """
        if not self._needs.distribution and not self._needs.layers:
            return TeacherSignal()
        wanted = self._needs.layers
        found = [self.store.read(sample.key, wanted) for sample in samples_of(batch)]
        # A rank without work has an empty batch, and an empty signal of the same form.
        some = found or [self.store.read(next(self.store.keys()), wanted)]
        signal = self._joined(some)
        if found:
            return signal
        nothing = slice(0, 0)
        return TeacherSignal.from_distribution(
            None if signal.distribution is None else signal.distribution.rows(nothing),
            {layer: states[nothing] for layer, states in signal.layer_hidden.items()},
        )

    def _joined(self, found: list[Record]) -> TeacherSignal:
        distribution: TeacherDistribution | None = None
        if self._needs.distribution and self._head is not None:
            # Hidden states move, the head stays where it is.
            lazy = self.store.join(found)
            assert isinstance(lazy, LazyLogits)
            distribution = LazyLogits(lazy.hidden.to(self._device), self._head)
        elif self._needs.distribution:
            distribution = self.store.join(found, self._device)
        layers = {
            layer: torch.cat([record.layers[layer] for record in found]).to(self._device)
            for layer in sorted(self._needs.layers)
        }
        return TeacherSignal.from_distribution(distribution, layers)


def samples_of(batch: Batch) -> Iterator[Sample]:
    """The windows of a batch that have scored positions, in the order of those positions."""
    inputs, targets = batch.input_ids.cpu().numpy(), batch.target_ids.cpu().numpy()
    scored, positions = batch.scored.cpu().numpy(), batch.position_ids.cpu().numpy()
    for row in range(len(inputs)):
        starts = [*(positions[row] == 0).nonzero()[0].tolist(), inputs.shape[1]]
        for start, end in itertools.pairwise(starts):
            if scored[row, start:end].any():
                tokens = np.append(inputs[row, start:end], targets[row, end - 1])
                yield Sample(tokens.astype(np.int32), scored[row, start:end].copy())


@teachers.register("stored")
def stored(place: Place, *, path: str) -> StoredTeacher:
    """A teacher recorded with `limbeck record`: no forward pass, no teacher in memory."""
    return StoredTeacher(Store.open(Path(path).expanduser()), place.device)
