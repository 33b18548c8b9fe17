"""A local teacher whose last hidden states are cached by batch."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.losses import TeacherSignal
from limbeck.losses.distributions import LazyLogits
from limbeck.models import PreTrainedTokenizerBase
from limbeck.teachers.base import DISTRIBUTION, Teacher, TeacherInfo, TeacherRequest
from limbeck.teachers.local import LocalTeacher


class RememberingTeacher(Teacher):
    """Caches last hidden states, for text that is measured again and again.

    D numbers a token are kept, not V, and the distributions are exact. Do not cache across ranks: a
    hit would skip collectives the other ranks wait in.
    """

    def __init__(self, teacher: LocalTeacher) -> None:
        """
        Args:
            teacher: Runs once for each batch.
        """
        self._teacher = teacher
        self._hidden: dict[bytes, Float[Tensor, "N D"]] = {}

    @property
    def info(self) -> TeacherInfo:
        """Info of the teacher behind the cache."""
        return self._teacher.info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the teacher behind the cache."""
        return self._teacher.tokenizer

    def require(self, request: TeacherRequest) -> None:
        """Nothing to prepare: signals always hold distributions, and nothing else."""
        assert request.needs == DISTRIBUTION, "only distributions are cached"

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's distribution at the scored positions of a batch."""
        model = self._teacher.model
        key = fingerprint(batch)
        if key not in self._hidden:
            self._hidden[key], _ = model(batch)
        return TeacherSignal.from_distribution(LazyLogits(self._hidden[key], model.head))


def for_measuring(teacher: Teacher, world: World) -> Teacher:
    """The teacher with distributions as its only needs, cached where that is possible.

    Independent of what the objective requires of `teacher`: weights and stores are shared, needs
    are not.
    """
    measuring = teacher.with_needs(DISTRIBUTION)
    if world.size == 1 and isinstance(measuring, LocalTeacher):
        return RememberingTeacher(measuring)
    return measuring


def fingerprint(batch: Batch) -> bytes:
    """A hash of everything a model reads of a batch."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (batch.input_ids, batch.position_ids, batch.scored):
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.digest()
