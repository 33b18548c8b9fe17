"""The interface of a teacher, what is known about it, and what a run requires of it."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from limbeck.batch import Batch
from limbeck.data import HeldOut, TextData
from limbeck.data.held_out import option_of
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError
from limbeck.losses import Head, Objective, SignalNeeds, TeacherSignal
from limbeck.models import PreTrainedTokenizerBase
from limbeck.registry import Registry

DISTRIBUTION = SignalNeeds(distribution=True)
"""Next-token distributions only."""
NOTHING = SignalNeeds()


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """What a report, a checkpoint and a student's layer map need to know about a teacher.

    Attributes:
        layers: Number of transformer blocks.
        width: Hidden size.
        vocabulary_rows: Rows of its head, padding included.
        name: Path or hub name it was loaded from.
        revision: Commit of a hub model.
        weights_sha256: Hash of its weight files.
        tokenizer_sha256: Hash of its tokenizer, if that is not the student's.
        template_sha256: Hash of its chat template, likewise.
        family: Model type of its configuration.
        parameters: Number of parameters.
        bytes: Bytes of its parameters.
        dtype: Data type of its weights.
        quantized: `8bit` or `4bit` where the weights of its blocks are kept so.
        max_positions: Longest sequence it was made for.
        recorded: Form, number of tokens and hash of the store, for a stored teacher.
        served: Name of the model in its server and what it is asked for, for a served teacher.
    """

    layers: int
    width: int
    vocabulary_rows: int
    name: str | None = None
    revision: str | None = None
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    template_sha256: str | None = None
    family: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    dtype: str | None = None
    quantized: str | None = None
    max_positions: int | None = None
    recorded: Mapping[str, Any] | None = None
    served: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> TeacherInfo:
        """The info in a JSON object; keys it does not know are dropped.

        Raises:
            DataError: `layers`, `width` or `vocabulary_rows` is missing.
        """
        if missing := sorted({"layers", "width", "vocabulary_rows"} - facts.keys()):
            raise DataError(
                f"The description of a teacher must have layers, width and vocabulary_rows, and "
                f"has no {', '.join(missing)}. Record the store again."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in facts.items() if name in names})

    def to_json(self) -> dict[str, Any]:
        """The fields that are known, as JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class TextWindows:
    """Windows of a text that a run will read.

    Attributes:
        option: The recipe's option that names the text, for messages.
        windows: Indices into `data.windows`.
    """

    option: str
    data: TextData
    windows: Sequence[int]


def windows_of(held_out_sets: Mapping[str, HeldOut]) -> list[TextWindows]:
    """The windows of held-out texts that a run measures on."""
    return [
        TextWindows(option_of(name), each.data, each.windows)
        for name, each in held_out_sets.items()
    ]


@dataclass(frozen=True, kw_only=True)
class TeacherRequest:
    """What a run requires of its teacher. A field left at its default requires nothing.

    Attributes:
        needs: What every signal must hold.
        temperatures: Every temperature at which distributions are compared in any step.
        objective: Its logit terms must accept the teacher's form of distribution.
        texts: Windows the teacher will be asked for.
        vocabulary_size: Number of token ids that student and teacher share.
        student_tokenizer: Must read text as the teacher's does.
        uses_template: Whether the text is chats, so that the chat template counts too.
        measured: Whether students are measured against the teacher, at temperature 1.
        generated: Whether the run also asks for text that is generated while it runs.
        whole_vocabulary: Whether every distribution must be over the whole vocabulary.
    """

    needs: SignalNeeds = NOTHING
    temperatures: tuple[float, ...] = ()
    objective: Objective | None = None
    texts: tuple[TextWindows, ...] = ()
    vocabulary_size: int | None = None
    student_tokenizer: PreTrainedTokenizerBase | None = None
    uses_template: bool = False
    measured: bool = False
    generated: bool = False
    whole_vocabulary: bool = False


class Teacher(ABC):
    """A source of `TeacherSignal`s, called once per micro-batch before the student's forward."""

    gives_likelihoods: ClassVar[bool] = False
    """Whether signals can hold the model's likelihoods of the text."""

    @property
    @abstractmethod
    def info(self) -> TeacherInfo:
        """Name, hash and shape of the model that answers."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the ids it reads: that of its model, but for `cross_tokenizer`."""

    @property
    def head(self) -> Head | None:
        """The output head of its hidden states, if signals hold these; see `LazyLogits`."""
        return None

    @abstractmethod
    def require(self, request: TeacherRequest) -> None:
        """Prepare for a run before step 0: from here on every signal holds `request.needs`.

        Raises:
            ConfigError: The teacher cannot provide what is requested.
            DataError: Windows are missing from it.
        """

    @property
    def inner(self) -> Sequence[Teacher]:
        """The teachers it is made of; the methods below call theirs unless overridden."""
        return ()

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Start work on batches that `signal` will be called with next."""
        for each in self.inner:
            each.prefetch(batches)

    @property
    def works_ahead(self) -> bool:
        """Whether `prefetch` is worth calling with batches of the next step too."""
        return any(each.works_ahead for each in self.inner)

    @abstractmethod
    def signal(self, batch: Batch) -> TeacherSignal:
        """Distributions and hidden states at the scored positions of a batch, without gradients."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it was loaded."""
        return tuple(note for each in self.inner for note in each.notes)

    def release(self) -> None:
        """Release the memory that reading the last signal needs, once it has been read.

        Does nothing without weights here. Every rank calls it.
        """
        for each in self.inner:
            each.release()

    def restore(self) -> None:
        """Make signals readable again after `release`; every rank calls it."""
        for each in self.inner:
            each.restore()

    def abandon_pass(self) -> None:
        """Release what a forward pass that failed has left. Does nothing without weights here."""
        for each in self.inner:
            each.abandon_pass()

    def shard(self, world: World) -> None:
        """Spread its weights over the ranks, and adopt rank 0's hash of them; every rank calls it.

        Does nothing for a teacher without weights here.

        Args:
            world: The ranks; without a mesh each keeps all of the weights.
        """
        for each in self.inner:
            each.shard(world)

    def with_needs(self, needs: SignalNeeds) -> Teacher:
        """The same teacher with needs of its own; weights and stores are shared, not copied."""
        other = copy.copy(self)
        other.require(TeacherRequest(needs=needs))
        return other


class WrappingTeacher(Teacher):
    """A teacher whose model is another teacher's."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    @property
    def inner(self) -> Sequence[Teacher]:
        return (self._teacher,)

    @property
    def info(self) -> TeacherInfo:
        return self._teacher.info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._teacher.tokenizer


teachers: Registry[Teacher] = Registry("teacher", package="limbeck.teachers")
"""Factories `(world: World, *, options) -> Teacher`.

Only rank 0's needs to hash weight files. Where `world` has a mesh, weights may stay in their files
until `shard` is called.
"""


def require_likelihoods(needs: SignalNeeds, teacher: Teacher) -> None:
    """Refuse a term that reads the teacher's likelihoods of the text where it gives none."""
    if needs.likelihoods and not teacher.gives_likelihoods:
        raise ConfigError(
            "objective.extra: terms of type alm and sampled_reverse_kl need the teacher's "
            "likelihood of the text, which this teacher does not give. Use teacher.type online, "
            "served or cross_tokenizer, or remove the term."
        )
