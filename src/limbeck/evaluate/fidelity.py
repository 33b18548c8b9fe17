"""Divergences from the teacher on held-out text, measured in every run."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.distributed import all_sum
from limbeck.evaluate.measure import measure
from limbeck.evaluate.scores import Scores
from limbeck.evaluate.suites import SuiteContext
from limbeck.models import CausalLM
from limbeck.teachers.remembering import for_measuring

MEASURED_ROWS = 4
"""Rows of one forward pass. It keeps nothing for a backward pass, so it is not the recipe's
`memory.micro_batch`."""


class Fidelity:
    """Measures students against one teacher, which only has to give distributions."""

    def __init__(self, context: SuiteContext) -> None:
        self._context = context
        self._teacher = for_measuring(context.teacher, context.world)

    def validation(self, student: CausalLM) -> Scores:
        """Scores on the validation documents; every rank calls it."""
        return self._scores(student, self._context.held_out.validation_rows)

    def test(self, student: CausalLM) -> Scores:
        """Scores on the test documents; every rank calls it."""
        return self._scores(student, self._context.held_out.test_rows)

    def _scores(self, student: CausalLM, rows: Sequence[int]) -> Scores:
        world = self._context.world
        return measure(
            student,
            self._teacher,
            self._context.held_out.data,
            rows[world.rank :: world.size],
            micro_batch=MEASURED_ROWS,
            device=world.device,
            reduce=all_sum if world.size > 1 else None,
            head_budget_mb=self._context.head_budget_mb,
        )
