"""Models that write: in this process, or in a server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from limbeck.data import AskedPrompt
from limbeck.models import CausalLM
from limbeck.rollouts import Rollout, Sampling, sample
from limbeck.teachers import Teacher, require_local
from limbeck.teachers.served import ServedTeacher, Written

BATCHES_AHEAD = 2
"""Batches that a server is asked for before the first of them is complete."""


@dataclass(frozen=True)
class Job:
    """One answer to be written.

    Attributes:
        number: Of the answer, where a prompt gets several.
        seed: Of its draws.
    """

    prompt: AskedPrompt
    number: int
    seed: int


class Writer(ABC):
    """A model that continues prompts."""

    @abstractmethod
    def write(self, batches: Sequence[Sequence[Job]]) -> Iterator[list[Rollout]]:
        """The rollouts of every batch, in order."""


class LocalWriter(Writer):
    """A model in this process."""

    def __init__(self, model: CausalLM, sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling

    def write(self, batches: Sequence[Sequence[Job]]) -> Iterator[list[Rollout]]:
        for batch in batches:
            prompts, seeds = [job.prompt.ids for job in batch], [job.seed for job in batch]
            yield sample(self._model, prompts, self._sampling, seeds)


class ServedWriter(Writer):
    """A model in a server, asked for the next batches too."""

    def __init__(self, teacher: ServedTeacher[Any], sampling: Sampling) -> None:
        self._teacher, self._sampling = teacher, sampling

    def write(self, batches: Sequence[Sequence[Job]]) -> Iterator[list[Rollout]]:
        asked = deque[list[tuple[Job, Future[Written]]]]()
        for number in range(len(batches)):
            while len(asked) < BATCHES_AHEAD and number + len(asked) < len(batches):
                batch = batches[number + len(asked)]
                asked.append([(job, self._ask(job)) for job in batch])
            written = [(job, future.result()) for job, future in asked.popleft()]
            self._teacher.require_same_model()
            yield [
                Rollout(
                    job.prompt.ids,
                    each.token_ids,
                    each.logprobs,
                    "end" if each.is_ended else "length",
                )
                for job, each in written
            ]

    def _ask(self, job: Job) -> Future[Written]:
        return self._teacher.write(
            job.prompt.ids,
            tokens=self._sampling.tokens,
            temperature=self._sampling.sampling_temperature,
            top_p=self._sampling.top_p,
            seed=job.seed,
        )


def writer_of(teacher: Teacher, sampling: Sampling) -> Writer:
    """The writer for a teacher.

    Raises:
        ConfigError: It is not one model, here or in a vLLM server.
    """
    if isinstance(teacher, ServedTeacher):
        teacher.require_writer()
        return ServedWriter(teacher, sampling)
    return LocalWriter(require_local(teacher, "write").model, sampling)
