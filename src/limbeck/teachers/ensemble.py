"""The mixture of several teachers' probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.losses import TeacherSignal
from limbeck.losses.distributions import Mixture
from limbeck.registry import Component
from limbeck.teachers.base import Teacher, TeacherRequest
from limbeck.teachers.base import teachers as registry
from limbeck.teachers.several import SeveralTeachers


class Ensemble(SeveralTeachers):
    """The mixture sum_i w_i p_i of probabilities at temperature 1, never of logits."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        """
        Args:
            members: At least one.
            weights: Positive, one a member; divided by their sum.
        """
        super().__init__({str(index): member for index, member in enumerate(members)})
        self._log_weights = tuple(math.log(weight / sum(weights)) for weight in weights)

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """The mixture at the scored positions of a batch."""
        if not self._needs.distribution:
            return TeacherSignal()
        given = [member.signal(batch).distribution for member in self._members.values()]
        found = tuple(each for each in given if each is not None)
        return TeacherSignal.from_distribution(Mixture(found, self._log_weights))

    def _requests(self, request: TeacherRequest) -> Mapping[str, TeacherRequest]:
        return dict.fromkeys(self._members, replace(request, whole_vocabulary=True))


@registry.register("ensemble")
def ensemble(
    world: World, *, teachers: list[Component], weights: list[float] | None = None
) -> Ensemble:
    """The mixture of several teachers' probabilities, by weight.

    Probabilities are mixed at temperature 1; another temperature softens the mixture.

    Args:
        teachers: Teachers that give whole distributions: online, hidden states of a server, or
            stores of them.
        weights: One positive number for each teacher; equal by default.
    """
    weights = weights or [1.0] * len(teachers)
    if not teachers or len(weights) != len(teachers) or not all(0 < w < math.inf for w in weights):
        raise ConfigError(
            "teacher.weights: must be one positive number for each of at least one teacher, got "
            f"{weights} for {len(teachers)}. Correct the list, or leave it out for equal weights."
        )
    members = [
        registry.bind(spec, f"teacher.teachers[{index}]")(world)
        for index, spec in enumerate(teachers)
    ]
    return Ensemble(members, weights)
