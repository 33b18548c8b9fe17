"""Base class of teachers made of several others."""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.losses import SignalNeeds
from limbeck.models import PreTrainedTokenizerBase
from limbeck.teachers.base import DISTRIBUTION, Teacher, TeacherInfo, TeacherRequest
from limbeck.teachers.cross_tokenizer import find_cross
from limbeck.teachers.local import LocalTeacher, require_local
from limbeck.tokenizers import prove_same_vocabulary, tokens_by_id


def require_all_local(teacher: Teacher, purpose: str) -> tuple[LocalTeacher, ...]:
    """The teachers that a teacher is made of, whose weights must be in this process.

    Args:
        purpose: What needs the weights, as the subject of the message.
    """
    if isinstance(teacher, SeveralTeachers):
        return tuple(each for one in teacher.inner for each in require_all_local(one, purpose))
    return (require_local(teacher, purpose),)


class SeveralTeachers(Teacher):
    """Teachers with one vocabulary, each under a name. They give distributions only."""

    def __init__(self, members: Mapping[str, Teacher]) -> None:
        """
        Args:
            members: At least one. The tokenizer with the fewest ids reads the text.

        Raises:
            ConfigError: An id means different tokens to two of them, or one has another tokenizer
                than the student; which.
        """
        if unlike := [name for name, member in members.items() if find_cross(member)]:
            raise ConfigError(
                "teacher.teachers: all must read the student's ids, and those of type "
                f"cross_tokenizer do not: {', '.join(unlike)}. Use it as the only teacher."
            )
        self._members = dict(members)
        self._needs = DISTRIBUTION
        self._has_ranks = False
        reader = min(members, key=lambda name: len(tokens_by_id(members[name].tokenizer)))
        self._tokenizer = members[reader].tokenizer
        for name, member in members.items():
            try:
                prove_same_vocabulary(
                    member.tokenizer,
                    self._tokenizer,
                    student_rows=member.info.vocabulary_rows,
                    teacher_rows=members[reader].info.vocabulary_rows,
                )
            except ConfigError as error:
                raise ConfigError(
                    f"teacher.teachers: all must have one vocabulary, and {name!r} (here called "
                    f"student) and {reader!r} (here called teacher) do not. {error}"
                ) from error

    @property
    def inner(self) -> Sequence[Teacher]:
        return tuple(self._members.values())

    @property
    def info(self) -> TeacherInfo:
        """Names and hashes of all; sums of sizes, minima of limits, layers of the first."""
        infos = [member.info for member in self._members.values()]
        hashes = [info.weights_sha256 for info in infos if info.weights_sha256]
        counts = [info.parameters for info in infos if info.parameters is not None]
        sizes = [info.bytes for info in infos if info.bytes is not None]
        limits = [info.max_positions for info in infos if info.max_positions is not None]
        joined = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        return replace(
            infos[0],
            name=", ".join(f"{name}: {m.info.name}" for name, m in self._members.items()),
            revision=None,
            weights_sha256=joined if len(hashes) == len(infos) else None,
            vocabulary_rows=min(info.vocabulary_rows for info in infos),
            parameters=sum(counts) if len(counts) == len(infos) else None,
            bytes=sum(sizes) if len(sizes) == len(infos) else None,
            max_positions=min(limits, default=None),
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the fewest ids."""
        return self._tokenizer

    def require(self, request: TeacherRequest) -> None:
        """Require the same of every member.

        Raises:
            ConfigError: Hidden states are read, or a member cannot provide what is requested.
            DataError: Windows are missing from a member.
        """
        if request.needs.layers or request.needs.projections:
            raise ConfigError(
                "The objective must read nothing but distributions of several teachers, and it "
                f"reads layers {sorted(request.needs.layers | request.needs.projections)}. Leave "
                "that term out, or use one teacher."
            )
        for name, own in self._requests(request).items():
            self._members[name].require(own)
        self._needs = request.needs

    @abstractmethod
    def _requests(self, request: TeacherRequest) -> Mapping[str, TeacherRequest]:
        """What is required of each member."""

    def shard(self, world: World) -> None:
        self._has_ranks = world.size > 1
        super().shard(world)

    def with_needs(self, needs: SignalNeeds) -> Teacher:
        other = copy.copy(self)
        other._members = {name: each.with_needs(needs) for name, each in self._members.items()}
        other._needs = needs
        return other
