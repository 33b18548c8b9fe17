"""What of a student is trained, as a recipe says it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Interval

from limbeck.config.schedules import STRICT
from limbeck.registry import Problem, suggest

PARTS = ("embeddings", "head", "norms", "attention", "feed_forward")
"""What `freeze` may name besides `layers.3` and `layers.0-3`."""

LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Adapters of low rank (LoRA): all weights are frozen, and W + alpha / rank * B A is used."""

    __pydantic_config__ = STRICT
    rank: Annotated[int, Gt(0)] = 16
    """Rows of A, columns of B."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """Times 1 / rank it scales the change."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Of what the adapters read."""
    targets: tuple[str, ...] = ()
    """Ends of names of linear modules, e.g. `[q_proj, v_proj]`; all of the blocks' by default."""
    dora: bool = False
    """Train each row's length by itself beside its direction (DoRA)."""


@dataclass(frozen=True, kw_only=True)
class TrainableConfig:
    """What of the student is trained; everything, unless this says otherwise."""

    __pydantic_config__ = STRICT
    lora: LowRankConfig | None = None
    """Train adapters only, which are merged into the weights when the student is saved."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are, e.g. `[embeddings, head, norms, layers.0-3]`."""


def trainable_problems(config: TrainableConfig) -> Iterator[Problem]:
    """What can be known to be wrong without the student."""
    if config.lora is not None and config.freeze:
        yield Problem(
            "trainable.freeze",
            "adapters freeze every weight of the student already, got both. Leave out freeze, or "
            "name in lora.targets where adapters are to be.",
        )
    for place, part in enumerate(config.freeze):
        if part not in PARTS and not LAYERS.fullmatch(part):
            yield Problem(
                f"trainable.freeze[{place}]",
                f"must be one of {', '.join(PARTS)}, or layers.3, or layers.0-3, got "
                f"{part!r}{suggest(part, PARTS)}.",
            )


def layers_named(part: str) -> range | None:
    """The layers that `layers.3` or `layers.0-3` names, the last one included; None for others.

    Example:
        >>> layers_named("layers.0-3"), layers_named("layers.7"), layers_named("head")
        (range(0, 4), range(7, 8), None)
    """
    found = LAYERS.fullmatch(part)
    if found is None:
        return None
    first = int(found[1])
    return range(first, int(found[2] or first) + 1)
