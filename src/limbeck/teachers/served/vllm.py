"""vLLM's `/v1/completions` with `prompt_logprobs`: what is asked, and every check of the answer.

Source: vLLM 0.32, `entrypoints/openai/completion/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from limbeck.errors import DataError
from limbeck.teachers.served.interface import (
    VALUE_TOLERANCE,
    Interface,
    Rows,
    checked,
    described,
    require_echo,
    rows_after_null,
    wrong,
)

COMPLETIONS = "/v1/completions"


class VllmInterface(Interface):
    """vLLM's completions with `prompt_logprobs`."""

    name = "vllm"
    reserved = 0
    has_adapters = True
    remedy = "Start vLLM with --max-logprobs of at least teacher.k"

    def tokenizing(self, text: str) -> tuple[str, dict[str, Any]]:
        return COMPLETIONS, tokens_body(self.model, text)

    def token_ids(self, answer: Any) -> list[int]:
        return echoed_ids(answer)

    def scoring(self, tokens: Sequence[int], k: int) -> tuple[str, dict[str, Any]]:
        return COMPLETIONS, {**tokens_body(self.model, tokens), "prompt_logprobs": k}

    def rows(self, answer: Any, tokens: Sequence[int], k: int) -> Rows:
        require_echo(echoed_ids(answer), tokens)
        given = choice_of(answer).get("prompt_logprobs")
        rows, targets = rows_after_null(given, "prompt_logprobs", len(tokens)), tokens[1:]
        return checked(*parsed(rows, targets, k), targets, k, self.vocabulary_rows)


def tokens_body(model: str, prompt: str | Sequence[int]) -> dict[str, Any]:
    """The request whose answer repeats a prompt as token ids.

    Sampling settings are explicit: a server's defaults come from the model's generation_config. One
    token must be generated, since vLLM refuses 0.
    """
    return {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else [int(token) for token in prompt],
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "add_special_tokens": False,
        "return_token_ids": True,
    }


class Written(NamedTuple):
    """A continuation that a server wrote.

    Attributes:
        logprobs: Of its tokens under the model, at temperature 1.
        is_ended: Whether the model ended it; otherwise it was cut.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_ended: bool


def writing_body(
    model: str, prompt: Sequence[int], *, tokens: int, temperature: float, top_p: float, seed: int
) -> dict[str, Any]:
    """The request for a continuation of a prompt.

    Every way to change the distribution is set: a server's defaults come from the model's
    generation_config.
    """
    return {
        **tokens_body(model, prompt),
        "max_tokens": tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "logprobs": 1,
    }


def read_written(answer: Any, prompt: Sequence[int]) -> Written:
    """The continuation in an answer.

    Raises:
        DataError: The answer is not to this prompt, or lacks tokens, log-probabilities or the
            reason why it ended.
    """
    if echoed_ids(answer) != list(prompt):
        raise wrong("be to the token ids that were sent", "is to others")
    choice = choice_of(answer)
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(ids, list) or not isinstance(logprobs, list) or len(ids) != len(logprobs):
        raise wrong(
            "have a log-probability of every token",
            f"has {described(ids)} as tokens and {described(logprobs)} as log-probabilities",
        )
    if reason not in ("stop", "length"):
        raise wrong("end with 'stop' or 'length'", f"ended with {described(reason)}")
    values = tuple(float(each) for each in logprobs)
    if any(not np.isfinite(each) or each > VALUE_TOLERANCE for each in values):
        raise wrong("have log-probabilities of at most 0", "has others")
    return Written(tuple(int(each) for each in ids), values, reason == "stop")


def choice_of(answer: Any) -> Mapping[str, Any]:
    """The one choice of an answer.

    Raises:
        DataError: There is not exactly one.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise wrong("have one choice for one prompt", f"has {described(choices)}")
    return choices[0]


def echoed_ids(answer: Any) -> list[int]:
    """The token ids of the prompt, as the server read it.

    Raises:
        DataError: The answer does not hold them.
    """
    ids = choice_of(answer).get("prompt_token_ids")
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise wrong(
            "repeat the ids of the prompt (prompt_token_ids)",
            f"has {described(ids)}: the server does not know return_token_ids. Update vLLM, or set "
            "teacher.server if it is not vLLM",
        )
    return ids


def parsed(rows: Sequence[Any], targets: Sequence[int], k: int) -> tuple[Any, Any, Any, Any]:
    """Lists of ids, ranks and log-probabilities [L, k], and of those of the targets [L].

    A row has k tokens, or k + 1 if the text's own is not among them. The rank of that one is
    ignored: with ties, vLLM gives it the rank of another token.
    """
    ids, ranks, values, actual = [], [], [], []
    for place, (row, target) in enumerate(zip(rows, targets, strict=True), 1):
        try:
            own = row.get(str(target))
            if own is None:
                raise wrong(
                    "give the text's own token at every position",
                    f"does not give token {target} at position {place}",
                )
            kept = [
                (token, each) for token, each in row.items() if len(row) <= k or each is not own
            ]
            if len(kept) != k:
                raise wrong(
                    f"give the {k} most probable tokens at every position",
                    f"gives {len(kept)} at position {place}",
                )
            ids.append([int(token) for token, _ in kept])
            ranks.append([int(each["rank"]) for _, each in kept])
            values.append([float(each["logprob"]) for _, each in kept])
            actual.append(float(own["logprob"]))
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise wrong(
                "give {id: {logprob, rank}} at every position",
                f"has something else at position {place}: {type(error).__name__} {error}",
            ) from error
    return ids, ranks, values, actual
