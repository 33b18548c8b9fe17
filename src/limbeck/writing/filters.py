"""Conditions for an answer to be kept: limbeck's, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from annotated_types import Ge, Gt, Le

from limbeck.config.plugins import reason
from limbeck.data import reader_of
from limbeck.data.formats import Encoder
from limbeck.errors import ConfigError
from limbeck.registry import Component, Registry, type_of
from limbeck.writing.answers import Answer

Keep = Callable[[Answer], bool]
"""Whether an answer is kept."""

filters: Registry[Keep] = Registry("filter", package="limbeck.writing")
"""Factories of `Keep`, whose keyword-only parameters are the options."""


@filters.register("length")
def length(
    *, at_least: Annotated[int, Ge(0)] = 0, at_most: Annotated[int, Gt(0)] | None = None
) -> Keep:
    """Number of tokens, the end token included.

    Args:
        at_least: Shorter answers are dropped.
        at_most: Longer answers are dropped; no limit by default.
    """
    return lambda answer: at_least <= answer.tokens <= (at_most or answer.tokens)


@filters.register("repetition")
def repetition(*, at_most: Annotated[float, Ge(0), Le(1)]) -> Keep:
    """Share of the 4-grams that stand earlier in the same answer.

    Args:
        at_most: Answers with a larger share are dropped.
    """
    return lambda answer: answer.repeated <= at_most


@filters.register("perplexity")
def perplexity(*, at_most: Annotated[float, Gt(0)]) -> Keep:
    """The teacher's perplexity of its own answer.

    Args:
        at_most: Answers with a larger perplexity are dropped.
    """
    return lambda answer: answer.perplexity <= at_most


class AnswerFilters:
    """Decides which answers are kept."""

    def __init__(
        self, kind: str, encoder: Encoder, specs: Sequence[Component | str], *, truncated: bool
    ) -> None:
        """
        Args:
            kind: Data type of the rows, which must be readable by a run.
            specs: The recipe's filters.
            truncated: Whether answers without an end are kept.
        """
        self._reader, self._encoder, self._truncated = reader_of(kind), encoder, truncated
        self._filters = [
            (
                f"write.filters[{index}]",
                type_of(spec),
                filters.bind(spec, f"write.filters[{index}]")(),
            )
            for index, spec in enumerate(specs)
        ]

    def reason(self, answer: Answer) -> str | None:
        """Why an answer is dropped; None if it is kept."""
        if not answer.text.strip():
            return "empty"
        if answer.rollout.finish == "length" and not self._truncated:
            return "truncated"
        columns = answer.columns
        if self._reader.problem(columns) or isinstance(
            self._reader.encode([columns], self._encoder)[0], str
        ):
            return "unreadable"
        for at, name, keep in self._filters:
            if not kept(keep, answer, f"{at}: {name}"):
                return name
        return None


def kept(keep: Keep, answer: Answer, name: str) -> bool:
    """What a filter says, which may be a user's own.

    Raises:
        ConfigError: It fails, or says neither True nor False.
    """
    try:
        said = keep(answer)
    except Exception as error:  # the user's own code, which may raise anything
        raise ConfigError(
            f"{name} must say whether an answer is kept, and failed on the answer to "
            f"{answer.prompt.place}: {reason(error)}. Correct it and run the same command again."
        ) from error
    if not isinstance(said, bool):
        raise ConfigError(
            f"{name} must return True or False, and returned {said!r} for the answer to "
            f"{answer.prompt.place}. Correct it and run the same command again."
        )
    return said
