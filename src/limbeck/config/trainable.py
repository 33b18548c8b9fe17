"""The recipe's options for training a part of the student."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Interval

from limbeck.config.schedules import STRICT
from limbeck.registry import Problem, suggest

PARTS = ("embeddings", "head", "norms", "attention", "feed_forward")
"""What `freeze` may name besides `layers.3` and `layers.0-3`."""

WeightFormat = Literal["q4_0", "q8_0"]
"""Formats of GGUF files with blocks of 32 weights: 4 bits and 8 bits a weight, and a scale."""

Bits = Literal["8bit", "4bit"]

LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Adapters of low rank (LoRA): all weights are frozen, and W + alpha / rank * B A is used."""

    __pydantic_config__ = STRICT
    rank: Annotated[int, Gt(0)] = 16
    """Rank of the update: rows of A, columns of B."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ()
    """Ends of names of linear modules, e.g. `[q_proj, v_proj]`; all of the blocks' by default."""
    dora: bool = False
    """Train the norm of each row separately (DoRA)."""
    quantize: Bits | None = None
    """Keep the frozen linear layers of the blocks in `8bit` (int8) or `4bit` (NF4; QLoRA)."""


@dataclass(frozen=True, kw_only=True)
class TrainableConfig:
    """What is trained of the student; everything by default."""

    __pydantic_config__ = STRICT
    lora: LowRankConfig | None = None
    """Train adapters only. The saved student has them merged, and unmerged in `adapter/`."""
    freeze: tuple[str, ...] = ()
    """Frozen parts, e.g. `[embeddings, head, norms, layers.0-3]`."""
    quantize: WeightFormat | None = None
    """Compute with the weights of the blocks' linear layers rounded to this format of GGUF."""


def trainable_problems(config: TrainableConfig) -> Iterator[Problem]:
    """Errors that can be found without the student."""
    if config.lora is not None and config.freeze:
        yield Problem(
            "trainable.freeze",
            "adapters freeze every weight of the student already, got both. Leave out freeze, or "
            "name in lora.targets where adapters are to be.",
        )
    if config.lora is not None and config.quantize is not None:
        yield Problem(
            "trainable.quantize",
            "trains the weights that are rounded, and adapters leave them as they are, got both. "
            "Leave out lora, or use trainable.lora.quantize: adapters over frozen rounded weights.",
        )
    if config.lora is not None and config.lora.dora and config.lora.quantize is not None:
        yield Problem(
            "trainable.lora.quantize",
            "DoRA divides by the norms of whole rows, which quantised weights do not give, got "
            f"dora: true with {config.lora.quantize}. Leave one of the two out.",
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
    match = LAYERS.fullmatch(part)
    if match is None:
        return None
    first = int(match[1])
    return range(first, int(match[2] or first) + 1)
