"""State of a run that is saved with every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.config import leaves
from limbeck.errors import ConfigError


@dataclass
class Totals:
    """Counters of a run; all are saved with every checkpoint.

    Attributes:
        step: Steps, skipped ones included.
        tokens: Scored tokens trained on.
        seconds: Time in steps.
        best_step: Step with the lowest selection metric; None before the first evaluation.
        best_value: Its value.
        bad_in_row: Consecutive steps, the last one included, that were not finite.
        micro_batch: Rows of a micro-batch; another number gives the same step, not the same bits.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    bad_in_row: int = 0
    micro_batch: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run whose recipe or data differ."""
    before = dict(leaves(saved))
    after = dict(leaves(json.loads(json.dumps(now))))
    lines = [
        f"{at}: was {before.get(at, 'absent')!r}, is {after.get(at, 'absent')!r}"
        for at in sorted(before.keys() | after.keys())
        if before.get(at) != after.get(at) or (at in before) != (at in after)
    ]
    if lines:
        raise ConfigError(
            "\n  ".join(
                [
                    "A run is resumed with the recipe and the data it began with. Put these back, "
                    "or choose another output:",
                    *lines,
                ]
            )
        )
