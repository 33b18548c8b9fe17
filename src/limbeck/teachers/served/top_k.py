"""The k most probable tokens from an inference server, as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from limbeck.batch import Batch, sent
from limbeck.errors import ConfigError, DataError
from limbeck.losses import Objective, TeacherSignal
from limbeck.losses.distributions import FLOOR, TopK
from limbeck.losses.signal import ChunkLikelihoods
from limbeck.store import Sample
from limbeck.teachers.base import TeacherRequest
from limbeck.teachers.served.base import ServedTeacher
from limbeck.teachers.served.interface import Rows
from limbeck.teachers.served.probe import notes_of, score
from limbeck.teachers.served.vllm import VllmInterface

SMALLEST_TAIL = 1e-5
"""Rounding of a float32 softmax over a vocabulary: a smaller tail, one minus a sum of the server's
probabilities, is indistinguishable from none. With an empty tail a divergence has no bound."""


class TopKTeacher(ServedTeacher[Rows]):
    """The k most probable tokens, the tail and the likelihood of the text, at temperature 1."""

    @property
    def _k(self) -> int:
        return int(self._probed.rows.ids.shape[1])

    @property
    def notes(self) -> tuple[str, ...]:
        """Noise of the server, and how much of the probability k tokens hold."""
        mass = float(np.exp(self._probed.rows.logprobs).sum(-1).mean())
        holds = f"{self._k} tokens hold {mass:.2%} of the probability of the probe text"
        return notes_of(self._probed.noise, holds)

    def _require(self, request: TeacherRequest) -> None:
        """Compare what k tokens at temperature 1 hold with what the run reads.

        Raises:
            ConfigError: It reads whole distributions, another temperature, or a divergence or term
                that is not defined on k tokens and a tail.
        """
        if request.whole_vocabulary:
            raise ConfigError(
                "A mixture of teachers needs distributions over the whole vocabulary, and a served "
                f"teacher gives {self._k} tokens and a tail. Use `{{type: online, path: ...}}`, or "
                "the server's hidden states (teacher.states)."
            )
        if self._k >= self._vocabulary_size:
            raise ConfigError(
                f"teacher.k: must be less than the {self._vocabulary_size:,} tokens of the "
                f"vocabulary, got {self._k}. Lower it."
            )
        require_temperature_1(request.temperatures)
        if request.objective is not None and request.needs.distribution:
            self._require_terms(request.objective)

    def _require_terms(self, objective: Objective) -> None:
        """Compute every logit term once, on one position."""
        rows = Rows(*(each[:1] for each in self._probed.rows))
        position = top_k_of([(rows, np.ones(1, dtype=np.bool_))], self._k)
        objective.try_terms(self._info.vocabulary_rows, position)

    def require_writer(self) -> None:
        """Refuse a server that is asked for log-probabilities only.

        Raises:
            ConfigError: It is not vLLM.
        """
        if not isinstance(self._probed.interface, VllmInterface):
            raise ConfigError(
                "teacher.server: must be vllm to write answers, got "
                f"{self._probed.interface.name}. Start the model in vLLM to write, or use "
                "`teacher: {type: online, path: ...}`."
            )

    def _answer(self, tokens: Sequence[int]) -> Rows:
        return score(self._server, self._probed.interface, tokens, self._k)

    def _signal(self, answers: Sequence[tuple[Sample, Rows]], batch: Batch) -> TeacherSignal:
        """The k most probable tokens and the tail at the scored positions of a batch.

        The likelihood of the text's own token is given whether or not it is among the k.
        """
        signal = TeacherSignal()
        if self._needs.distribution:
            signal = TeacherSignal.from_distribution(self._distribution(answers))
        if not self._needs.likelihoods:
            return signal
        actual = [rows.actual[sample.scored] for sample, rows in answers] or [np.empty(0)]
        known = torch.from_numpy(np.concatenate(actual).astype(np.float32))
        logprobs = sent(known, self._device)
        chunk_of = torch.arange(len(logprobs), device=self._device)
        return replace(signal, likelihoods=ChunkLikelihoods(chunk_of, logprobs))

    def _distribution(self, answers: Sequence[tuple[Sample, Rows]]) -> TopK:
        distribution = top_k_of([(rows, sample.scored) for sample, rows in answers], self._k)
        largest = int(distribution.ids.max()) if distribution.ids.numel() else 0
        if largest >= self._vocabulary_size:
            raise DataError(
                f"The server must give tokens that the student has, ids 0 to "
                f"{self._vocabulary_size - 1:,}, and gave {largest:,}: a row of the served model's "
                "padding, or a special token of one of the two. Lower teacher.k, or record with "
                "the model here, which leaves such rows out."
            )
        return distribution.to(self._device)


def top_k_of(read: Sequence[tuple[Rows, np.ndarray]], k: int) -> TopK:
    """The distribution at the scored positions of several windows.

    The tail is one minus the sum, at least `SMALLEST_TAIL`; all is rescaled to add up to 1.

    Args:
        read: Rows of every window, and which are scored.
        k: Tokens of a row.
    """
    ids = [rows.ids[scored] for rows, scored in read] or [np.empty((0, k), dtype=np.int64)]
    values = [rows.logprobs[scored] for rows, scored in read] or [np.empty((0, k))]
    known = np.concatenate(values)
    total = np.exp(known).sum(-1)
    tail = np.maximum(1 - total, SMALLEST_TAIL)
    whole = np.log(total + tail)
    return TopK(
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.maximum(known - whole[:, None], FLOOR).astype(np.float32)),
        torch.from_numpy((np.log(tail) - whole).astype(np.float32)),
    )


def require_temperature_1(temperatures: Sequence[float]) -> None:
    """Refuse every other temperature.

    Raises:
        ConfigError: There is one.
    """
    if others := sorted({each for each in temperatures if each != 1.0}):
        raise ConfigError(
            "objective.temperature: must be 1 with a served teacher, got "
            f"{' and '.join(f'{each:g}' for each in others)}. Servers give log-probabilities of a "
            "prompt at temperature 1 whatever the request asks for, and the tail of k tokens at "
            "another cannot be computed. Set objective.temperature=1, use the server's hidden "
            "states (teacher.states), or record with the model itself at the temperatures you need."
        )
