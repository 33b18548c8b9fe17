"""A teacher whose distributions are cached by batch."""

from __future__ import annotations

import hashlib

import torch

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.losses import TeacherSignal
from limbeck.teachers.base import DISTRIBUTION, Teacher, TeacherRequest, WrappingTeacher
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.served import ServedTeacher


class RememberingTeacher(WrappingTeacher):
    """Caches distributions, for text that is measured again and again.

    Of a teacher that gives hidden states D numbers a token are kept, not V; of others what they
    gave, such as k tokens. Do not cache a local teacher across ranks: a hit would skip collectives
    the other ranks wait in.
    """

    def __init__(self, teacher: Teacher) -> None:
        """
        Args:
            teacher: Called once for each batch; must give distributions only.
        """
        super().__init__(teacher)
        self._signals: dict[bytes, TeacherSignal] = {}

    def require(self, request: TeacherRequest) -> None:
        """Nothing to prepare: signals always hold distributions, and nothing else."""
        assert request.needs == DISTRIBUTION, "only distributions are cached"

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        key = fingerprint(batch)
        if key not in self._signals:
            self._signals[key] = self._teacher.signal(batch)
        self._teacher.restore()  # a step of training since then has released the head
        return self._signals[key]


def for_measuring(teacher: Teacher, world: World) -> Teacher:
    """The teacher with distributions as its only needs, cached where that is possible.

    Independent of what the objective requires of `teacher`: weights and stores are shared, needs
    are not.
    """
    measuring = teacher.with_needs(DISTRIBUTION)
    is_alone = world.size == 1 and isinstance(measuring, LocalTeacher)
    return (
        RememberingTeacher(measuring)
        if is_alone or isinstance(measuring, ServedTeacher)
        else measuring
    )


def fingerprint(batch: Batch) -> bytes:
    """A hash of everything a model reads of a batch."""
    digest = hashlib.blake2b(digest_size=16)
    host = batch.on_host
    for part in (host.input_ids, host.position_ids, host.scored):
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()
