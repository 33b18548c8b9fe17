"""What a run remembers from one life to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.config import leaves
from limbeck.errors import ConfigError


@dataclass
class Totals:
    """Where a run is; all of it is saved with every checkpoint.

    Attributes:
        step: Steps taken, those on which nothing was learned included.
        tokens: Scored tokens learned from.
        seconds: Time in steps.
        best_step: Step of the least held-out divergence; None before the first measurement.
        best_value: That divergence.
        bad_in_row: Steps in a row, up to now, that were not finite.
        micro_batch: Rows of a micro-batch. Other cuts give the same step, but not the same bits.
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
    """Refuse to continue a run that depends on something else than this one."""
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
