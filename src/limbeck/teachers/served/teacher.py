"""A teacher that runs in an inference server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from rich.console import Console

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.errors import ConfigError, DataError
from limbeck.losses import Objective, TeacherSignal
from limbeck.losses.distributions import FLOOR, TopK
from limbeck.losses.signal import ChunkLikelihoods
from limbeck.models import PreTrainedTokenizerBase, configured_shape
from limbeck.store import Sample
from limbeck.teachers.ahead import Ahead
from limbeck.teachers.base import DISTRIBUTION, Teacher, TeacherInfo, TeacherRequest, teachers
from limbeck.teachers.served.interface import Interface, Rows
from limbeck.teachers.served.probe import Probed, probe, require_same_model, score
from limbeck.teachers.served.requests import Connection, Server, checked_url, key_of
from limbeck.teachers.served.sglang import SglangInterface
from limbeck.teachers.served.vllm import (
    COMPLETIONS,
    VllmInterface,
    Written,
    read_written,
    writing_body,
)
from limbeck.tokenizers import load_tokenizer

REACHED_BY = ("url", "key_env", "concurrency", "timeout_s", "patience_s")
"""Options that do not change the numbers; a run may be resumed with others."""

INTERFACES: Mapping[str, type[Interface]] = {"vllm": VllmInterface, "sglang": SglangInterface}

SMALLEST_TAIL = 1e-5
"""Rounding of a float32 softmax over a vocabulary: a smaller tail, one minus a sum of the server's
probabilities, is indistinguishable from none. With an empty tail a divergence has no bound."""


class ServedTeacher(Teacher):
    """The k most probable tokens from a server that runs the model, window by window.

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
    ) -> None:
        assert info.served is not None
        self._server, self._probed, self._device = server, probed, device
        self._info, self._tokenizer = info, tokenizer
        self._model: str = info.served["model"]
        self._k: int = info.served["k"]
        self._vocabulary_size = info.vocabulary_rows
        self._needs = DISTRIBUTION
        self._ahead = Ahead(self._asked)
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
    def notes(self) -> tuple[str, ...]:
        """Noise of the server, and how much of the probability k tokens hold."""
        return self._probed.notes

    @property
    def works_ahead(self) -> bool:
        """Windows of later steps are fetched while the student computes."""
        return self._needs.distribution or self._needs.likelihoods

    def require(self, request: TeacherRequest) -> None:
        """Compare what k tokens at temperature 1 hold with what the run reads.

        Raises:
            ConfigError: It reads layers, whole distributions, another temperature, or a divergence
                or term that is not defined on k tokens and a tail.
        """
        if request.needs.layers or request.needs.projections:
            raise ConfigError(
                "The objective must read nothing but distributions of a served teacher, and it "
                f"reads layers {sorted(request.needs.layers | request.needs.projections)}. Leave "
                "that term out, or use `teacher: {type: online, path: ...}`."
            )
        if request.whole_vocabulary:
            raise ConfigError(
                "A mixture of teachers needs distributions over the whole vocabulary, and a served "
                f"teacher gives {self._k} tokens and a tail. Use `{{type: online, path: ...}}`."
            )
        self._needs = request.needs
        if request.vocabulary_size is not None:
            self._vocabulary_size = request.vocabulary_size
            if self._k >= request.vocabulary_size:
                raise ConfigError(
                    f"teacher.k: must be less than the {request.vocabulary_size:,} tokens of the "
                    f"vocabulary, got {self._k}. Lower it."
                )
        require_temperature_1(request.temperatures)
        if request.objective is not None and request.needs.distribution:
            self._require_terms(request.objective)

    def _require_terms(self, objective: Objective) -> None:
        """Compute every logit term once, on one position."""
        rows = Rows(*(each[:1] for each in self._probed.rows))
        position = top_k_of([(rows, np.ones(1, dtype=np.bool_))], self._k)
        logits = torch.zeros(1, self._info.vocabulary_rows)
        for term in objective.logit_terms.values():
            term(logits, torch.zeros(1, dtype=torch.int64), position)

    def prefetch(self, batches: Sequence[Batch]) -> None:
        """Ask the server for the windows of these batches, in their order."""
        if self.works_ahead:
            self._ahead.announce(batches)

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

    def write(
        self, prompt: Sequence[int], *, tokens: int, temperature: float, top_p: float, seed: int
    ) -> Future[Written]:
        """Let the server continue a prompt, in the background.

        Args:
            tokens: At most so many.
            seed: Of the draws, below 2^63.
        """
        body = writing_body(
            self._model, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        return self._server.submit(
            lambda: read_written(self._server.ask(COMPLETIONS, body), list(prompt))
        )

    def require_same_model(self) -> None:
        """Refuse a server that came back with another model.

        Raises:
            ConfigError: It did.
        """
        if self._server.outages != self._outages:
            require_same_model(self._server, self._probed)
            self._outages = self._server.outages

    def _asked(self, sample: Sample) -> Future[Rows]:
        tokens = sample.tokens.tolist()
        interface = self._probed.interface
        return self._server.submit(partial(score, self._server, interface, tokens, self._k))

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """The k most probable tokens and the tail at the scored positions of a batch.

        The likelihood of the text's own token is given whether or not it is among the k.

        Raises:
            DataError: An answer is not what it should be; nothing is learnt from it.
            TryLaterError: The server was away for too long.
        """
        if not self.works_ahead:
            return TeacherSignal()
        answers = self._ahead.take(batch)
        self.require_same_model()
        signal = TeacherSignal()
        if self._needs.distribution:
            signal = TeacherSignal.from_distribution(self._distribution(answers))
        if not self._needs.likelihoods:
            return signal
        actual = [rows.actual[sample.scored] for sample, rows in answers] or [np.empty(0)]
        logprobs = torch.from_numpy(np.concatenate(actual).astype(np.float32)).to(self._device)
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
            "another cannot be computed. Set objective.temperature=1, or record with the model "
            "itself at the temperatures you need."
        )


def describe(facts: Mapping[str, Any], model: str, k: int, longest: int) -> TeacherInfo:
    """Name and shape of a served model, from the facts in its configuration.

    A window of n positions is a prompt of n + 1 tokens, and one more token is generated.
    """
    limits = [each for each in (facts.get("max_positions"), longest - 2) if each is not None]
    return TeacherInfo.from_json(
        {**facts, "name": model, "max_positions": min(limits), "served": {"model": model, "k": k}}
    )


def say(text: str) -> None:
    """A line for the user; stdout is for results."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


@teachers.register("served")
def served(
    world: World,
    *,
    url: str,
    model: str,
    server: Literal["vllm", "sglang"] = "vllm",
    k: Annotated[int, Ge(1), Le(10_000)] = 64,
    path: str | None = None,
    key_env: str | None = None,
    concurrency: Annotated[int, Ge(1), Le(512)] = 16,
    timeout_s: Annotated[float, Gt(0)] = 300.0,
    patience_s: Annotated[float, Ge(0)] = 600.0,
) -> ServedTeacher:
    """A model in an inference server: the k most probable tokens and the tail, at temperature 1.

    Args:
        url: Address of the server, http or https.
        model: Name of the model in the server (`--served-model-name`).
        server: What the server runs: `vllm`, or `sglang`.
        k: Tokens requested at each position; at most vLLM's `--max-logprobs`.
        path: Folder or Hub name with the model's tokenizer and config.json, by default `model`; no
            weights are read.
        key_env: Environment variable that holds the server's key.
        concurrency: Requests in flight at once, of each rank.
        timeout_s: Seconds to wait for one answer.
        patience_s: Seconds to wait during the run for a server that does not respond.
    """
    connection = Connection(
        url=checked_url(url),
        key=key_of(key_env),
        concurrency=concurrency,
        timeout_s=timeout_s,
        patience_s=patience_s,
    )
    tokenizer, facts = load_tokenizer(path or model), configured_shape(path or model)
    client = Server(connection, say)
    probed = probe(client, INTERFACES[server](model, facts["vocabulary_rows"]), k, tokenizer)
    info = describe(facts, model, k, probed.max_model_len)
    return ServedTeacher(client, probed, info, tokenizer, world.device)
