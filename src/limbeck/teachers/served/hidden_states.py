"""Hidden states from a vLLM server, as a teacher over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.batch import Batch
from limbeck.errors import ConfigError
from limbeck.losses import Head, TeacherSignal
from limbeck.losses.distributions import LazyLogits
from limbeck.losses.head.likelihood import with_likelihoods
from limbeck.models import FinalLayers, PreTrainedTokenizerBase
from limbeck.store import Sample
from limbeck.teachers.base import TeacherInfo, TeacherRequest
from limbeck.teachers.served.base import ServedTeacher
from limbeck.teachers.served.probe import Probed, notes_of
from limbeck.teachers.served.requests import Server
from limbeck.teachers.served.states_folder import UnfinishedError, UnwrittenError
from limbeck.teachers.served.states_probe import StatesInterface, require_final_states

BYTES_AHEAD = 1 << 30
"""Of states that are in memory before they are read, about."""


class HiddenStatesTeacher(ServedTeacher[Tensor]):
    """The model's blocks run in the server, its final norm and its head here.

    Signals are those of a local teacher: logits at any temperature.
    """

    def __init__(
        self,
        server: Server,
        interface: StatesInterface,
        probed: Probed,
        agreement: float,
        layers: FinalLayers,
        info: TeacherInfo,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """
        Args:
            agreement: Largest difference from the server's own log-probabilities in the probe,
                nats.
            layers: Of the served model.
        """
        device = layers.head.weight.device
        most_positions = max(BYTES_AHEAD // (4 * info.width), 1)
        super().__init__(server, probed, info, tokenizer, device, most_positions=most_positions)
        self._interface, self._agreement = interface, agreement
        self._whole = self._layers = layers

    @property
    def head(self) -> Head:
        """The head, over the vocabulary that student and teacher share."""
        return self._layers.head

    @property
    def notes(self) -> tuple[str, ...]:
        """How well hidden states and the server's own log-probabilities agree, and its noise."""
        return notes_of(
            self._probed.noise,
            "log-probabilities from the server's hidden states differ from its own by up to "
            f"{self._agreement:.2g} nats",
        )

    def _require(self, request: TeacherRequest) -> None:
        """Cut the head to the shared vocabulary."""
        if request.vocabulary_size is not None:
            self._layers = self._whole.cut(request.vocabulary_size)

    def require_writer(self) -> None:
        """Refuse to write: every answer would leave a file of hidden states behind.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "teacher.states: must be left out to write answers, which need no hidden states. "
            "Start the server without --kv-transfer-config, and set teacher.states=null."
        )

    def require_same_model(self) -> None:
        """Refuse a server that came back with another model, or with states of another layer.

        Raises:
            ConfigError: Its states are others.
            DataError: Its log-probabilities are.
        """
        came_back = self._server.outages != self._outages
        super().require_same_model()
        if came_back:
            probe = self._server, self._interface, self._probed
            require_final_states(*probe, self._whole, self._info.layers)

    def _answer(self, tokens: Sequence[int]) -> Float[Tensor, "n D"]:
        """The last token is predicted, never read."""
        read = tokens[:-1]
        path, body = self._interface.reading(read)
        try:
            return self._interface.states(self._server.ask(path, body), read)
        except (UnwrittenError, UnfinishedError):  # a server that dies may leave no or half a file
            return self._interface.states(self._server.ask(path, body), read)

    def _signal(self, answers: Sequence[tuple[Sample, Tensor]], batch: Batch) -> TeacherSignal:
        """Last hidden states with the head, at the scored positions of a batch."""
        scored = [states[torch.from_numpy(sample.scored)] for sample, states in answers]
        states = torch.cat(scored or [torch.empty(0, self._info.width)])
        hidden = self._layers.last_hidden(states)
        distribution = LazyLogits(hidden, self.head) if self._needs.distribution else None
        signal = TeacherSignal.from_distribution(distribution)
        if not self._needs.likelihoods:
            return signal
        return with_likelihoods(signal, hidden, self.head, batch.targets())
