"""A teacher that gives a training step a part of each distribution, and all to a measurement."""

from __future__ import annotations

from dataclasses import replace

import torch

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.losses import SignalNeeds, TeacherSignal
from limbeck.losses.distributions import FLOOR, TopK
from limbeck.registry import Component
from limbeck.store import forms, generator_of
from limbeck.teachers.base import Teacher, TeacherRequest, WrappingTeacher, teachers


class ReducedTeacher(WrappingTeacher):
    """What a store of some form would answer, without its rounding."""

    def __init__(
        self, teacher: Teacher, form: Component | str, seed: int, *, renormalised: bool
    ) -> None:
        super().__init__(teacher)
        self._form = forms.bind(form, "teacher.form")(teacher.info.vocabulary_rows)
        self._renormalised = renormalised
        self._generator = generator_of(seed, b"reduced")

    def require(self, request: TeacherRequest) -> None:
        self._teacher.require(replace(request, objective=None))

    def with_needs(self, needs: SignalNeeds) -> Teacher:
        """The whole teacher, for measuring."""
        return self._teacher.with_needs(needs)

    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's signal with reduced distributions."""
        signal = self._teacher.signal(batch)
        if signal.distribution is None:
            return signal
        reduced = self._form.read_teacher(signal.distribution, self._generator)
        if self._renormalised:
            assert isinstance(reduced, TopK)
            nothing = torch.full_like(reduced.tail_logprob, FLOOR)
            reduced = TopK(reduced.ids, reduced.logprobs.log_softmax(-1), nothing)
        return TeacherSignal.from_distribution(reduced)


@teachers.register("reduced")
def reduced(
    world: World, *, teacher: Component, form: Component, seed: int, renormalised: bool = False
) -> ReducedTeacher:
    """A teacher whose distributions are reduced to a store's form in training steps.

    Args:
        teacher: The model.
        form: As `record.form`.
        seed: Of samples.
        renormalised: Divide the k kept probabilities by their sum and leave the tail out.
    """
    inner = teachers.bind(teacher, "teacher")(world)
    return ReducedTeacher(inner, form, seed, renormalised=renormalised)
