"""The teacher's last hidden states: its logits at any temperature, through its head."""

from __future__ import annotations

import torch

from limbeck.errors import ConfigError, DataError
from limbeck.losses import Head
from limbeck.losses.distributions import DenseLogits, LazyLogits, TeacherDistribution
from limbeck.store import states
from limbeck.store.forms.base import Form, forms
from limbeck.store.ranks import Ranks
from limbeck.store.states import Precision


@forms.register("hidden")
class HiddenForm(Form):
    """The last hidden states, and once for the store the teacher's head; serves everything."""

    needs_head = True

    def __init__(
        self, vocabulary_size: int, head: Head | None = None, *, precision: Precision = "exact"
    ) -> None:
        """
        Args:
            vocabulary_size: Tokens the teacher's distributions are over.
            head: The teacher's; a store hands in its own.
            precision: `exact` keeps the teacher's own numbers, bit by bit; `float16` rounds them;
                `int8` keeps a byte a number, within half of 1/127 of its group's largest.
        """
        self._vocabulary_size = vocabulary_size
        self._precision: Precision = precision
        self._head = head

    def with_head(self, head: Head) -> HiddenForm:
        return HiddenForm(self._vocabulary_size, head, precision=self._precision)

    def read_teacher(
        self, distribution: DenseLogits | LazyLogits, generator: torch.Generator
    ) -> LazyLogits:
        del generator
        if not isinstance(distribution, LazyLogits):
            raise ConfigError(
                "The form 'hidden' records hidden states, and this teacher gives logits only. "
                "Use the form top_k or samples, or a teacher that runs here."
            )
        return LazyLogits(distribution.hidden.detach(), distribution.head)

    def encode(self, signal: TeacherDistribution, ranks: Ranks) -> bytes:
        del ranks
        assert isinstance(signal, LazyLogits)
        return states.encode(signal.hidden, self._precision)

    def decode(self, coded: memoryview, num_scored: int, ranks: Ranks) -> LazyLogits:
        del ranks
        assert self._head is not None, "a store hands in its head"
        hidden = states.decode(coded, num_scored)
        width = self._head.weight.shape[1]
        if hidden.shape[1] != width:
            raise DataError(
                f"Hidden states are {hidden.shape[1]:,} wide, and the head is {width:,}."
            )
        return LazyLogits(hidden, self._head)
