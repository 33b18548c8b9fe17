"""The base class of teachers in an inference server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

import torch

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses import TeacherSignal
from limbeck.models import PreTrainedTokenizerBase
from limbeck.store import Sample
from limbeck.teachers.ahead import Ahead
from limbeck.teachers.base import DISTRIBUTION, Teacher, TeacherInfo, TeacherRequest
from limbeck.teachers.served.probe import Probed, require_same_model
from limbeck.teachers.served.requests import Server
from limbeck.teachers.served.vllm import COMPLETIONS, Written, read_written, writing_body

T = TypeVar("T")


class ServedTeacher(Teacher, Generic[T]):
    """A model in a server, asked window by window; an answer to one is a `T`.

    A batch is cut into the windows it was packed from, as for a store. The answers to windows that
    were announced by `prefetch` are fetched in the background.
    """

    gives_likelihoods = True

    def __init__(
        self,
        server: Server,
        probed: Probed,
        info: TeacherInfo,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        *,
        most_positions: int | None = None,
    ) -> None:
        """
        Args:
            most_positions: Whose answers are in memory before they are read, about; see `Ahead`.
        """
        assert info.served is not None
        self._server, self._probed, self._device = server, probed, device
        self._info, self._tokenizer = info, tokenizer
        self._needs, self._vocabulary_size = DISTRIBUTION, info.vocabulary_rows
        self._ahead: Ahead[T] = Ahead(self._asked, most_positions=most_positions)
        self._outages = server.outages

    @property
    def info(self) -> TeacherInfo:
        """Name and shape of the model; a server does not say which weights it has."""
        return self._info

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was compared with the server's."""
        return self._tokenizer

    @property
    def works_ahead(self) -> bool:
        """Windows of later steps are fetched while the student computes."""
        return self._needs.distribution or self._needs.likelihoods

    def require(self, request: TeacherRequest) -> None:
        """Compare what the server gives with what the run reads.

        Raises:
            ConfigError: It reads layers, or something that this kind of answer does not hold.
        """
        if request.needs.layers or request.needs.projections:
            raise ConfigError(
                "The objective must read nothing but distributions of a served teacher, and it "
                f"reads layers {sorted(request.needs.layers | request.needs.projections)}. Leave "
                "that term out, or use `teacher: {type: online, path: ...}`."
            )
        self._needs = request.needs
        if request.vocabulary_size is not None:
            self._vocabulary_size = request.vocabulary_size
        self._require(request)

    @abstractmethod
    def _require(self, request: TeacherRequest) -> None:
        """The checks of this kind of answer."""

    @abstractmethod
    def _answer(self, tokens: Sequence[int]) -> T:
        """Ask the server about one window, and check what it answers; in the background."""

    @abstractmethod
    def _signal(self, answers: Sequence[tuple[Sample, T]], batch: Batch) -> TeacherSignal:
        """What is needed of the answers to a batch's windows, on the device."""

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Ask the server for the windows of these batches, in their order."""
        if self.works_ahead:
            self._ahead.announce(batches)

    @abstractmethod
    def require_writer(self) -> None:
        """Refuse a server that is asked for distributions only.

        Raises:
            ConfigError: It is.
        """

    def write(
        self, prompt: Sequence[int], *, tokens: int, temperature: float, top_p: float, seed: int
    ) -> Future[Written]:
        """Let the server continue a prompt, in the background.

        Args:
            tokens: At most so many.
            seed: Of the draws, below 2^63.
        """
        model = self._probed.interface.model
        body = writing_body(
            model, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        return self._server.submit(
            lambda: read_written(self._server.ask(COMPLETIONS, body), list(prompt))
        )

    def require_same_model(self) -> None:
        """Refuse a server that came back with another model.

        Raises:
            DataError: It did.
        """
        if self._server.outages != self._outages:
            require_same_model(self._server, self._probed)
            self._outages = self._server.outages

    def _asked(self, sample: Sample) -> Future[T]:
        return self._server.submit(partial(self._answer, sample.tokens.tolist()))

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """What is needed at the scored positions of a batch.

        Raises:
            DataError: An answer is not what it should be; nothing is learnt from it.
            TryLaterError: The server was away for too long.
        """
        if not self.works_ahead:
            return TeacherSignal()
        answers = self._ahead.take(batch)
        self.require_same_model()
        return self._signal(answers, batch)
