"""An answer of a teacher, as text and as the row of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from limbeck.data import AskedPrompt
from limbeck.models import PreTrainedTokenizerBase
from limbeck.rollouts import Rollout, figures_of


@dataclass(frozen=True)
class Answer:
    """An answer of a teacher to a prompt.

    Attributes:
        text: Without the end token.
        rollout: Its tokens, their log-probabilities under the teacher, and why it ended.
        number: Of the answer, from 0, where a prompt gets several.
    """

    prompt: AskedPrompt
    text: str
    rollout: Rollout
    number: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens, the end token included."""
        return len(self.rollout.token_ids)

    @property
    def logprob(self) -> float:
        """The teacher's mean log-probability of a token, nats, at temperature 1."""
        return sum(self.rollout.logprobs) / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """The teacher's, of its own answer."""
        return math.exp(-self.logprob)

    @cached_property
    def repeated(self) -> float:
        """Share of its 4-grams that occur earlier in it."""
        return figures_of([asdict(self.rollout)])["rollout_repeated"]

    @cached_property
    def columns(self) -> dict[str, Any]:
        """A row of data type `chat` or `completion`."""
        return self.prompt.answered(self.text)

    def row(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """The row, with what is known about its origin in a column that no run reads."""
        own = {
            "prompt": self.prompt.place,
            "answer": self.number,
            "finish": self.rollout.finish,
            "prompt_tokens": len(self.prompt.ids),
            "tokens": self.tokens,
            "logprob": round(self.logprob, 6),
        }
        return {**self.columns, "provenance": {**provenance, **own}}


def text_of(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> str | None:
    """The text of a rollout without its end token; None where tokens stand for no valid text.

    Chat templates differ in how they treat white space around an answer, so it is removed.
    """
    ids = list(rollout.token_ids)
    if rollout.finish == "end" and ids:
        ids.pop()
    if not set(ids).isdisjoint(tokenizer.all_special_ids):
        return None
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if "\ufffd" in text:
        return None
    return text.strip() if is_chat else text
