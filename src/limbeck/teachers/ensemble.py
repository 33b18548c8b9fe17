"""The mixture of several teachers' probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from limbeck.batch import Batch
from limbeck.distributed import World
from limbeck.errors import ConfigError
from limbeck.losses import TeacherSignal
from limbeck.losses.distributions import DenseLogits, LazyLogits, Mixture
from limbeck.registry import Component
from limbeck.teachers.base import Teacher
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
        """The mixture at the scored positions of a batch.

        Raises:
            ConfigError: A member does not give whole distributions.
        """
        if not self._needs.distribution:
            return TeacherSignal()
        given = []
        for name, member in self._members.items():
            distribution = member.signal(batch).distribution
            if not isinstance(distribution, DenseLogits | LazyLogits | Mixture):
                raise ConfigError(
                    f"teacher.teachers[{name}]: a mixture needs distributions over the whole "
                    f"vocabulary, and this teacher gives {type(distribution).__name__}. Use a "
                    "teacher that is online or whose hidden states were recorded."
                )
            given.append(distribution)
        return TeacherSignal.from_distribution(Mixture(tuple(given), self._log_weights))


@registry.register("ensemble")
def ensemble(
    world: World, *, teachers: list[Component], weights: list[float] | None = None
) -> Ensemble:
    """The mixture of several teachers' probabilities, by weight."""
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
