"""Last hidden states of the teacher, from which its head gives logits at any temperature."""

from __future__ import annotations

import torch

from limbeck.errors import ConfigError, DataError
from limbeck.losses import Head
from limbeck.losses.distributions import LazyLogits, TeacherDistribution
from limbeck.store import hidden_states
from limbeck.store.forms.base import Form, forms
from limbeck.store.hidden_states import Precision
from limbeck.store.token_ranks import TokenRanks


@forms.register("hidden")
class HiddenForm(Form):
    """Last hidden states, with the teacher's head once in the store; serves every divergence."""

    needs_head = True

    def __init__(
        self, vocabulary_size: int, head: Head | None = None, *, precision: Precision = "exact"
    ) -> None:
        """
        Args:
            precision: `exact` keeps every bit; `float16` rounds; `int8` keeps a byte for each
                value, with an error of at most half of 1/127 of the largest of its group of 64.
        """
        self._vocabulary_size = vocabulary_size
        self._precision: Precision = precision
        self._head = head

    def with_head(self, head: Head) -> HiddenForm:
        return HiddenForm(self._vocabulary_size, head, precision=self._precision)

    def read_teacher(
        self, distribution: TeacherDistribution, generator: torch.Generator
    ) -> LazyLogits:
        del generator
        if not isinstance(distribution, LazyLogits):
            raise ConfigError(
                "The form 'hidden' records hidden states, and this teacher does not give them. "
                "Use the form top_k, a teacher that runs here, or a served one with teacher.states."
            )
        return LazyLogits(distribution.hidden.detach(), distribution.head)

    def encode(self, signal: TeacherDistribution, ranks: TokenRanks) -> bytes:
        del ranks
        assert isinstance(signal, LazyLogits)
        return hidden_states.encode(signal.hidden, self._precision)

    def decode(self, coded: memoryview, num_scored: int, ranks: TokenRanks) -> LazyLogits:
        del ranks
        assert self._head is not None, "decode needs with_head"
        hidden = hidden_states.decode(coded, num_scored)
        width = self._head.weight.shape[1]
        if hidden.shape[1] != width:
            raise DataError(
                f"Hidden states are {hidden.shape[1]:,} wide, and the head is {width:,}."
            )
        return LazyLogits(hidden, self._head)
