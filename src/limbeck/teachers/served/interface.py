"""The interface of an inference server as a teacher, and the checks of every answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike

from limbeck.errors import DataError

MODELS = "/v1/models"
"""The list of models that every supported server has."""

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


class Interface(ABC):
    """One kind of inference server: its requests, and how its answers are read."""

    name: ClassVar[str]
    """As `teacher.server` names it."""
    reserved: ClassVar[int]
    """Positions of the model's length, beyond the generated one, that no prompt may use."""
    has_adapters: ClassVar[bool]
    """Whether a request for a listed LoRA adapter is answered by that adapter."""
    remedy: ClassVar[str]
    """What to do if k log-probabilities a position are refused."""

    def __init__(self, model: str, vocabulary_rows: int) -> None:
        """
        Args:
            model: Its name in the server.
            vocabulary_rows: Tokens in the model's configuration.
        """
        self.model, self.vocabulary_rows = model, vocabulary_rows

    @abstractmethod
    def tokenizing(self, text: str) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for the token ids of a text, without special tokens."""

    @abstractmethod
    def token_ids(self, answer: Any) -> list[int]:
        """The token ids in the answer to it.

        Raises:
            DataError: It does not hold them.
        """

    @abstractmethod
    def scoring(self, tokens: Sequence[int], k: int) -> tuple[str, dict[str, Any]]:
        """Path and body of the request for the k most probable tokens everywhere in a text."""

    @abstractmethod
    def rows(self, answer: Any, tokens: Sequence[int], k: int) -> Rows:
        """The rows in the answer to it, after every check there is.

        Raises:
            DataError: The answer is not of these tokens, or is not what a teacher says.
        """


def require_echo(echoed: Sequence[Any], tokens: Sequence[int]) -> None:
    """Refuse an answer that is of other tokens than were sent.

    Raises:
        DataError: It is.
    """
    if list(echoed) != list(tokens):
        raise wrong(
            "be of the token ids that were sent",
            f"is of others: {len(tokens)} were sent and {len(echoed)} came back, different "
            f"from position {first_difference(echoed, tokens)}",
        )


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The first place at which two lists differ."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def rows_after_null(rows: Any, name: str, num_tokens: int) -> list[Any]:
    """The rows of a list with one row a token, of which the first and no other is null.

    Raises:
        DataError: The list is another one.
    """
    if not isinstance(rows, list) or len(rows) != num_tokens:
        raise wrong(f"have {name} of {num_tokens} tokens", f"has {described(rows)}")
    if rows[0] is not None:
        raise wrong(
            f"have null as the first of {name}",
            "gives the first token a distribution: its rows are shifted by one",
        )
    if None in rows[1:]:
        raise wrong(f"have one null in {name}", f"has one at {rows.index(None, 1)}")
    return rows[1:]


def checked(
    ids: ArrayLike,
    ranks: ArrayLike,
    values: ArrayLike,
    actual: ArrayLike,
    targets: Sequence[int],
    k: int,
    vocabulary_rows: int,
) -> Rows:
    """The rows in order of rank.

    Args:
        values: Log-probabilities of the ids; all three are [L, k].
        actual: Log-probabilities of the targets, the text's own next tokens, [L].

    Raises:
        DataError: Ids, ranks or values are impossible.
    """
    shape = (len(targets), k)
    try:
        ids, ranks = (np.asarray(each, dtype=np.int64).reshape(shape) for each in (ids, ranks))
    except OverflowError as error:
        raise wrong("have ids and ranks of at most 64 bits", "has longer ones") from error
    values = np.asarray(values, dtype=np.float64).reshape(shape)
    actual = np.asarray(actual, dtype=np.float64)
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
            f"has {everything.max():.4g}: the server answers logits (vLLM does, unless it is "
            "started with --logprobs-mode raw_logprobs)",
        )
    if k > 1 and bool((np.diff(values, axis=-1) > VALUE_TOLERANCE).any()):
        raise wrong("have log-probabilities that fall with the rank", "has some that rise")
    total = np.exp(values).sum(-1)
    if bool((total > 1 + SUM_TOLERANCE).any()):
        raise wrong(
            "have probabilities of a position that add up to at most 1",
            f"has {total.max():.6g}: they are not log-probabilities over the whole vocabulary",
        )
    rows = Rows(ids, values, actual)
    require_plausible(rows, np.array(targets, dtype=np.int64), vocabulary_rows)
    return rows


def require_plausible(rows: Rows, targets: Int64[np.ndarray, " L"], vocabulary_rows: int) -> None:
    """Refuse ids that the model does not have, and rows that contradict the text's own tokens.

    Raises:
        DataError: An id is outside the vocabulary or given twice; or a text's own token has
            another value among the k, or is none of them and more probable.
    """
    ids, values, actual = rows
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary_rows:
        raise wrong(
            f"have ids of the model's configuration, 0 to {vocabulary_rows - 1:,}",
            f"has {ids.min():,} to {ids.max():,}",
        )
    if bool((np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any()):
        raise wrong("give every token of a position once", "gives one twice")
    is_own = ids == targets[:, None]
    there = np.abs((values * is_own).sum(-1) - actual)
    gap = np.where(is_own.any(-1), there, actual - values[:, -1])
    if bool((gap > VALUE_TOLERANCE).any()):
        raise wrong(
            "give the text's own token the log-probability that it has among the most probable",
            f"contradicts itself by {gap.max():.2g} nats at position {int(gap.argmax()) + 1}: its "
            "rows are of other positions",
        )


def wrong(wanted: str, found: str) -> DataError:
    """The error for an answer that is not what was asked for."""
    return DataError(
        f"The answer of the server must {wanted}, and {found}. It is not used; check which "
        "server and version it is."
    )


def described(value: Any) -> str:
    """A value that is not what it should be, shortly."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "none" if value is None else f"{str(value)[:40]!r}"
