"""Checks of a server before step 0: the model, its vocabulary, the form of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from limbeck.errors import ConfigError, DataError
from limbeck.models import PreTrainedTokenizerBase
from limbeck.teachers.served.interface import MODELS, Interface, Rows, first_difference
from limbeck.teachers.served.requests import RefusedError, Server

TEXTS = (
    "The distillation of a large model keeps what a small one can hold.",
    "In 1994 there were 12,345 of them; in 2026 only 7 (0.06 %).",
    "def f(x):\n    return {'a': x ** 2}  # \t two  spaces,   three\n\n\n",
    "Gr\u00fc\u00dfe aus K\u00f6ln, d\u00e9j\u00e0 vu, e\u0301 is not \u00e9; \ufb01ne "
    "\u2014 \u201cquoted\u201d \u2026",
    "\u65e5\u672c\u8a9e\u3001\u4e2d\u6587\u3001\ud55c\uad6d\uc5b4; "
    "\u041f\u0440\u0438\u0432\u0435\u0442; \u0645\u0631\u062d\u0628\u0627; "
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    " leading and trailing spaces \U0001f389\U0001f469\u200d\U0001f52c\ufe0f ",
)
"""Texts on which tokenizers differ: digits, spaces, code, composed and other scripts, emoji."""

PROBED_TOKENS = 128
CROWD = 8
"""Requests of the same text at once, to measure what batching changes."""

LARGE_NOISE = 0.02
"""Noise in nats above which a note says how to reduce it."""
LARGEST_SHIFT = 0.5
"""Mean nats a token by which a server that came back may differ; batching changes far less."""


class Noise(NamedTuple):
    """Largest differences between answers to one text, nats.

    Attributes:
        repeated: When it is asked for again.
        batched: When `CROWD` requests come at once.
    """

    repeated: float
    batched: float


@dataclass(frozen=True)
class Probed:
    """A server that passed.

    Attributes:
        interface: How it is asked.
        max_model_len: Tokens it accepts in a prompt and one more.
        tokens: The text it was probed with.
        rows: Its first answer.
        noise: How far its answers to one text are apart.
    """

    interface: Interface
    max_model_len: int
    tokens: tuple[int, ...]
    rows: Rows
    noise: Noise


def probe(
    server: Server, interface: Interface, k: int, tokenizer: PreTrainedTokenizerBase
) -> Probed:
    """Query and check a server before the first step.

    Raises:
        ConfigError: It serves another model, reads text differently, or has too low a limit.
        DataError: Its answers are not what a teacher says.
        TryLaterError: It does not answer.
    """
    listed, url = server.ask(MODELS, patience_s=0.0), server.connection.url
    longest = length_of(listed, url, interface.model, reserved=interface.reserved)
    require_no_adapter(listed, interface)
    require_same_tokens(server, interface, tokenizer)
    ids = [token for text in TEXTS for token in encoded(tokenizer, text)]
    tokens = tuple(ids[: min(PROBED_TOKENS, longest - 1)])
    try:
        first = score(server, interface, tokens, k, patience_s=0.0)
    except RefusedError as error:
        raise ConfigError(
            f"teacher.k: the server must give {k} log-probabilities a position, and refused: "
            f"{error} {interface.remedy}, or lower teacher.k."
        ) from error
    again = score(server, interface, tokens, k)
    crowd = [server.submit(partial(score, server, interface, tokens, k)) for _ in range(CROWD)]
    batched = max(distance(first, each.result()) for each in crowd)
    return Probed(interface, longest, tokens, first, Noise(distance(first, again), batched))


def score(
    server: Server,
    interface: Interface,
    tokens: Sequence[int],
    k: int,
    *,
    patience_s: float | None = None,
) -> Rows:
    """The k most probable tokens at every position of a text, checked.

    Raises:
        ConfigError: The server refuses.
        DataError: The answer is not what a teacher says.
        TryLaterError: The server does not answer for `patience_s`, the connection's by default.
    """
    path, body = interface.scoring(tokens, k)
    return interface.rows(server.ask(path, body, patience_s=patience_s), tokens, k)


def length_of(
    answer: Any, url: str, model: str, section: str = "teacher", *, reserved: int = 0
) -> int:
    """The longest sequence of the model, from the list of those served.

    Args:
        reserved: Positions of it that the server does not use.

    Raises:
        ConfigError: It is not served.
        DataError: The list is not one of models with `max_model_len`.
    """
    try:
        served = {str(each["id"]): each for each in answer["data"]}
    except (TypeError, LookupError) as error:
        raise DataError(
            f"{url}{MODELS} must list the models of a server, and does not ({error!r}). Give the "
            "address of an OpenAI-compatible server."
        ) from error
    if model not in served:
        raise ConfigError(
            f"{section}.model: must be a model that {url} serves ({', '.join(served) or 'none'}), "
            f"got {model!r}. Correct the name, or start the server with --served-model-name."
        )
    entry = served[model]
    base = served.get(str(entry.get("parent")), entry)  # of a LoRA adapter
    longest = entry.get("max_model_len") or base.get("max_model_len")
    if type(longest) is not int or longest < 3 + reserved:
        raise DataError(
            f"{url}{MODELS} must give a max_model_len of at least {3 + reserved} for {model}, and "
            f"gives {longest!r}. Use a server that states its context length, and a longer one."
        )
    return longest - reserved


def require_no_adapter(listed: Any, interface: Interface) -> None:
    """Refuse a LoRA adapter of a server that would answer with the model below it.

    Raises:
        ConfigError: The model is one.
    """
    parents = {each["id"]: each.get("parent") for each in listed["data"]}
    if parents[interface.model] is not None and not interface.has_adapters:
        raise ConfigError(
            f"teacher.model: must be no adapter with server: {interface.name}, got "
            f"{interface.model!r}, an adapter of {parents[interface.model]!r}. Merge it and serve "
            "the result, or serve it with vLLM."
        )


def require_same_tokens(
    server: Server, interface: Interface, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a server that reads a text as other tokens.

    Raises:
        ConfigError: It does; which text, and both readings.
    """
    for text in TEXTS:
        ours = encoded(tokenizer, text)
        path, body = interface.tokenizing(text)
        theirs = interface.token_ids(server.ask(path, body, patience_s=0.0))
        if ours != theirs:
            place = first_difference(ours, theirs)
            raise ConfigError(
                f"teacher.path: the tokenizer must be that of the served model, and the server "
                f"reads {text[:30]!r} as {len(theirs)} tokens where it gives {len(ours)}, "
                f"different from token {place} (served {theirs[place : place + 3]}, here "
                f"{ours[place : place + 3]}). Name the folder or hub name of the served model."
            )


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, without special tokens around it."""
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def notes_of(noise: Noise, finding: str) -> tuple[str, ...]:
    """What a user should know of a server's answers.

    Args:
        finding: About its first answer, as a main clause.
    """
    note = (
        f"teacher: {finding}; its log-probabilities differ by up to {noise.repeated:.2g} nats when "
        f"it is asked for again, and by up to {noise.batched:.2g} nats when {CROWD} requests come "
        "at once (batch-invariance noise)."
    )
    if noise.batched <= LARGE_NOISE:
        return (note,)
    return (
        note,
        "teacher: start the server with --dtype float32 for less noise, or record once and "
        "train from the store, which gives every step the same numbers.",
    )


def distance(one: Rows, other: Rows) -> float:
    """Largest difference of the log-probabilities that both answers give, nats."""
    found = [float(np.abs(one.actual - other.actual).max())]
    for place in range(len(one.ids)):
        _, mine, theirs = common(one.ids[place], other.ids[place])
        gaps = np.abs(one.logprobs[place][mine] - other.logprobs[place][theirs])
        found.append(float(gaps.max(initial=0.0)))
    return max(found)


def common(a: Int64[np.ndarray, " k"], b: Int64[np.ndarray, " k"]) -> tuple[Any, Any, Any]:
    """Ids in both, and their places in each."""
    return np.intersect1d(a, b, assume_unique=True, return_indices=True)


def require_same_model(server: Server, probed: Probed) -> None:
    """Refuse a server that has another model after an interruption.

    Raises:
        DataError: Its log-probabilities of the probed text are others.
    """
    k = probed.rows.ids.shape[1]
    now = score(server, probed.interface, probed.tokens, k)
    shift = float(np.abs(now.actual - probed.rows.actual).mean())
    if shift > LARGEST_SHIFT:
        raise DataError(
            f"The teacher's server {server.connection.url} must come back with the same model, and "
            f"its log-probabilities of one text are now {shift:.2f} nats a token apart. Start it "
            "with the model of this run, and resume."
        )
