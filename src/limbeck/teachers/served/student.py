"""A vLLM server that writes with the weights of the student in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from limbeck.errors import ConfigError, DataError, TryLaterError
from limbeck.teachers.served.interface import MODELS, described, wrong
from limbeck.teachers.served.probe import length_of
from limbeck.teachers.served.requests import Connection, RefusedError, Server
from limbeck.teachers.served.vllm import COMPLETIONS, Written, read_written, writing_body

RELOAD, RESET = "/collective_rpc", "/reset_prefix_cache"
"""Exist where vLLM is started with VLLM_SERVER_DEV_MODE=1."""


class ServedStudent:
    """Continues prompts in a server, whose weights are replaced from a folder it can read."""

    def __init__(self, server: Server, model: str, *, ends: frozenset[int], vocabulary_size: int):
        """
        Args:
            model: Its name in the server.
            ends: Tokens that end a text.
        """
        self._server, self._model = server, model
        self._ends, self._vocabulary_size = ends, vocabulary_size
        self._has_loaded = False

    @property
    def outages(self) -> int:
        """How often the server was away; it may have other weights since."""
        return self._server.outages

    def load(self, folder: Path) -> None:
        """Let the server read its weights from a folder, and drop what it cached with others.

        Raises:
            ConfigError: It does not know how.
            DataError: It still has earlier weights in its cache.
            TryLaterError: It does not answer, or failed to load them.
        """
        patience_s = None if self._has_loaded else 0.0
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._server.ask(RELOAD, body, patience_s=patience_s)
            answer = self._server.ask(RESET, {}, patience_s=patience_s)
        except RefusedError as error:
            raise ConfigError(
                f"rollout.server: the server must load the student's weights, and refused: {error} "
                "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment."
            ) from error
        except TryLaterError as error:
            raise TryLaterError(
                f"rollout.server: the server must load the student's weights from {folder}, which "
                f"it must be able to read under this path, and did not. {error}"
            ) from error
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise DataError(
                "rollout.server: the server must forget what it cached with earlier weights, and "
                f"answered {described(answer)}. Use it for this run alone, and resume."
            )
        self._has_loaded = True

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        tokens: int,
        temperature: float,
        top_p: float,
    ) -> list[Written]:
        """A continuation of each prompt, all of them asked for at once.

        Raises:
            DataError: One cannot be the student's.
            TryLaterError: The server was away for too long.
        """
        # Its own idea of an end comes from the files it was started with.
        ends = {"ignore_eos": True, "stop_token_ids": sorted(self._ends)}

        def job(prompt: Sequence[int], seed: int) -> Callable[[], Written]:
            body = writing_body(
                self._model, prompt, tokens=tokens, temperature=temperature, top_p=top_p, seed=seed
            )
            return lambda: read_written(self._server.ask(COMPLETIONS, body | ends), list(prompt))

        asked = [
            self._server.submit(job(prompt, seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [self._checked(future.result(), tokens) for future in asked]

    def _checked(self, written: Written, tokens: int) -> Written:
        """The continuation, if a student with these end tokens can have written it."""
        ids = written.token_ids
        ended = [token in self._ends for token in ids]
        if not 1 <= len(ids) <= tokens or (len(ids) < tokens and not written.is_ended):
            raise wrong(f"have {tokens} tokens, or fewer and an end", f"has {len(ids)}")
        if any(ended[:-1]) or ended[-1] != written.is_ended:
            raise wrong(
                f"end with its first token of {sorted(self._ends)}, and only then",
                f"ends with {ids[-1]} and {'stop' if written.is_ended else 'length'}",
            )
        if not 0 <= min(ids) <= max(ids) < self._vocabulary_size:
            raise wrong(f"have ids below {self._vocabulary_size:,}", f"has {max(ids):,}")
        return written


def reached(connection: Connection, model: str, say: Callable[[str], None], longest: int) -> Server:
    """A server that serves a model, after a first question.

    Args:
        longest: Tokens of the longest prompt and its continuation.

    Raises:
        ConfigError: It serves another model, or shorter texts only.
        TryLaterError: It does not answer.
    """
    server = Server(connection, say)
    listed = server.ask(MODELS, patience_s=0.0)
    limit = length_of(listed, connection.url, model, connection.section)
    if limit < longest:
        raise ConfigError(
            "rollout.server: prompts and rollouts of data.sequence_length must fit into the "
            f"server's {limit} positions, got {longest}. Start it with a larger --max-model-len."
        )
    return server
