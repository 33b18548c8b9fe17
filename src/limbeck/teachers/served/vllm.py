"""vLLM's `/v1/completions` with `prompt_logprobs`: what is asked, and every check of the answer.

Source: vLLM 0.32, `entrypoints/openai/completion/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from limbeck.errors import DataError

COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"

SUM_TOLERANCE = 1e-3
"""Tolerated excess over 1 of the sum of a position's probabilities."""
VALUE_TOLERANCE = 1e-4
"""Tolerated excess over 0 of a log-probability, and over the one ranked above it."""


class Rows(NamedTuple):
    """The most probable next tokens after every token of a text but the last.

    Attributes:
        ids: The k token ids of each position, most probable first.
        logprobs: Their log-probabilities.
        actual: Log-probability of the text's own next token.
    """

    ids: Int64[np.ndarray, "L k"]
    logprobs: Float64[np.ndarray, "L k"]
    actual: Float64[np.ndarray, " L"]


def scoring_body(model: str, tokens: Sequence[int], k: int) -> dict[str, Any]:
    """The request for the k most probable tokens at every position of a text."""
    return {**tokens_body(model, tokens), "prompt_logprobs": k}


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
            f"has {described(ids)}: the server does not know return_token_ids. Update vLLM",
        )
    return ids


def read_rows(answer: Any, tokens: Sequence[int], k: int) -> Rows:
    """The k most probable tokens at every position of a text, after every check there is.

    Raises:
        DataError: The answer is not of these tokens, or is not what a teacher says.
    """
    echoed = echoed_ids(answer)
    if echoed != list(tokens):
        pairs = enumerate(zip(echoed, tokens, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(echoed), len(tokens)))
        raise wrong(
            "be of the token ids that were sent",
            f"is of others: {len(tokens)} were sent and {len(echoed)} came back, different "
            f"from position {place}",
        )
    rows = choice_of(answer).get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(tokens):
        raise wrong(f"have prompt_logprobs of {len(tokens)} tokens", described(rows))
    if rows[0] is not None:
        raise wrong(
            "have null as the first of prompt_logprobs",
            "gives the first token a distribution: its rows are shifted by one",
        )
    return checked(*parsed(rows[1:], tokens[1:], k))


def parsed(rows: Sequence[Any], targets: Sequence[int], k: int) -> tuple[Any, Any, Any, Any]:
    """Ids, ranks and log-probabilities [L, k], and log-probabilities of the targets [L].

    A row has k tokens, or k + 1 if the text's own is not among them. The rank of that one is
    ignored: with ties, vLLM gives it the rank of another token.
    """
    ids, ranks, values, actual = [], [], [], []
    for place, (row, target) in enumerate(zip(rows, targets, strict=True), 1):
        try:
            if row is None:
                raise wrong("have one null in prompt_logprobs", f"has one at {place}")
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
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise wrong(
                "give {id: {logprob, rank}} at every position",
                f"has something else at position {place}: {type(error).__name__} {error}",
            ) from error
    shape = (len(rows), k)
    return (
        np.array(ids, dtype=np.int64).reshape(shape),
        np.array(ranks, dtype=np.int64).reshape(shape),
        np.array(values, dtype=np.float64).reshape(shape),
        np.array(actual, dtype=np.float64),
    )


def checked(
    ids: Int64[np.ndarray, "L k"],
    ranks: Int64[np.ndarray, "L k"],
    values: Float64[np.ndarray, "L k"],
    actual: Float64[np.ndarray, " L"],
) -> Rows:
    """The rows in order of rank.

    Raises:
        DataError: Ranks or values are impossible.
    """
    k = ids.shape[1]
    order = np.argsort(ranks, axis=-1)
    ids, ranks, values = (np.take_along_axis(each, order, -1) for each in (ids, ranks, values))
    if not bool((ranks == np.arange(1, k + 1)).all()):
        raise wrong(f"rank the tokens of a position 1 to {k}", "has other ranks")
    everything = np.concatenate([values.ravel(), actual])
    if not bool(np.isfinite(everything).all()):
        raise wrong("have numbers as log-probabilities", "has some that are not finite")
    if bool((everything > VALUE_TOLERANCE).any()):
        raise wrong(
            "have log-probabilities of at most 0",
            f"has {everything.max():.4g}: the server answers logits. Start it with "
            "--logprobs-mode raw_logprobs",
        )
    if k > 1 and bool((np.diff(values, axis=-1) > VALUE_TOLERANCE).any()):
        raise wrong("have log-probabilities that fall with the rank", "has some that rise")
    total = np.exp(values).sum(-1)
    if bool((total > 1 + SUM_TOLERANCE).any()):
        raise wrong(
            "have probabilities of a position that add up to at most 1",
            f"has {total.max():.6g}: they are not log-probabilities over the whole vocabulary",
        )
    return Rows(ids, values, actual)


def wrong(wanted: str, found: str) -> DataError:
    """The error for an answer that is not what was asked for."""
    return DataError(
        f"The answer of the server must {wanted}, and {found}. Nothing was learnt from "
        "it; use a server that answers as vLLM does."
    )


def described(value: Any) -> str:
    """A value that is not what it should be, shortly."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "none" if value is None else f"{str(value)[:40]!r}"
