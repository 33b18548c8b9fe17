"""Who measures: one teacher, one held-out text, and any number of students."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.config import HeadBudget
from limbeck.data.held_out import HeldOut
from limbeck.distributed import World, all_sum
from limbeck.evaluate.measure import measure
from limbeck.evaluate.scores import Scores
from limbeck.models import CausalLM
from limbeck.teachers import Teacher
from limbeck.teachers.remembering import for_measuring

MEASURED_ROWS = 4
"""Rows of one forward pass. It keeps nothing for a backward pass, so it is not the recipe's
`memory.micro_batch`."""


class Judge:
    """Measures students against a teacher, whatever an objective asks of that teacher."""

    def __init__(
        self, teacher: Teacher, held_out: HeldOut, world: World, head_budget_mb: HeadBudget
    ) -> None:
        """
        Args:
            teacher: With a model, or with the held-out windows recorded.
            held_out: The text, and which of it decides.
            world: The ranks, all of which measure together.
            head_budget_mb: Memory for the logits that exist at once.
        """
        self._held_out = held_out
        self._world = world
        self._head_budget_mb = head_budget_mb
        self._teacher = for_measuring(teacher, world)

    def deciding(self, student: CausalLM) -> Scores:
        """A student's figures on the documents that decide; every rank calls it."""
        return self._measure(student, self._held_out.deciding_rows)

    def reporting(self, student: CausalLM) -> Scores:
        """A student's figures on the documents that report; every rank calls it."""
        return self._measure(student, self._held_out.reporting_rows)

    def _measure(self, student: CausalLM, rows: Sequence[int]) -> Scores:
        rank, size = self._world.rank, self._world.size
        return measure(
            student,
            self._teacher,
            self._held_out.data,
            rows[rank::size],
            micro_batch=MEASURED_ROWS,
            device=self._world.device,
            reduce=all_sum if size > 1 else None,
            head_budget_mb=self._head_budget_mb,
        )
