"""The state of a run that its checkpoints carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.config import differences, leaves, refuse_differences


@dataclass
class Totals:
    """Progress of a run; all of it is saved with every checkpoint.

    Attributes:
        step: Steps, including those that were not finite and changed nothing.
        tokens: Scored tokens trained on.
        seconds: Time in steps.
        best_step: Step of the best validation metric; None before the first evaluation.
        best_value: The metric at that step.
        since_best: Evaluations after that step.
        bad_in_row: Number of consecutive non-finite steps up to now.
        micro_batch: Rows of a micro-batch; it does not change the step, but its last bits.
        ranks: For so many ranks it was chosen.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    since_best: int = 0
    bad_in_row: int = 0
    micro_batch: int = 0
    ranks: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


STEPS = "recipe.optim.steps"
"""The one option of which a resumed run may have more."""


def more_steps(saved: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """How many steps a recipe has more than the one that a run began with; 0 if not more."""
    before, after = (dict(leaves(each)).get(STEPS) for each in (saved, now))
    return max(0, after - before) if isinstance(before, int) and isinstance(after, int) else 0


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose recipe or data differ; it may have more steps."""
    found = differences(saved, now)
    if more_steps(saved, now):
        found.pop(STEPS, None)
    refuse_differences(
        found,
        "A run is resumed with the recipe and the data it began with. Put these back, or choose "
        "another output:",
    )
