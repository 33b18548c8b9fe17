"""From a number of parameters to a shape that has no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from limbeck.errors import ConfigError
from limbeck.models import PreTrainedConfig
from limbeck.prune.layouts import cut_config
from limbeck.prune.narrow import Widths, narrow_config, num_parameters, widths_of
from limbeck.prune.roles import roles_of

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
MULTIPLE = 8
"""Feed-forward units come in so many: matrix products are faster then."""
LEAST = 1 / 8
"""Smallest share of the units a target may lead to; what is left then is hardly the teacher."""


def count_of(told: int | str) -> int:
    """A number of parameters, as 60M.

    Example:
        >>> count_of("1.5B"), count_of("60M"), count_of(7000)
        (1500000000, 60000000, 7000)

    Raises:
        ConfigError: It is no such number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB]?)", str(told).strip().upper())
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"A number of parameters reads as 60M, 1.5B or 60000000, got {told!r}.")
    return round(float(found[1]) * UNITS[found[2]])


def layers_for(config: PreTrainedConfig, target: int) -> int:
    """The most layers of a model that together have at most so many parameters.

    Raises:
        ConfigError: One layer has more.
    """
    total = int(config.num_hidden_layers)
    one = num_parameters(cut_config(config, [0]))
    block = (num_parameters(config) - one) / max(total - 1, 1)
    if target < one:
        raise ConfigError(
            f"With one layer the student still has {one:,} parameters, and {target:,} were asked "
            "for: the embeddings alone are too many. Ask for more, or cut hidden too."
        )
    return min(total, 1 + int((target - one) / block)) if block else total


def widths_for(config: PreTrainedConfig, target: int) -> Widths:
    """The widest shape with at most so many parameters and the teacher's hidden size.

    Of each possible number of head groups the most feed-forward units; of these shapes the one that
    keeps the most equal shares of both.

    Raises:
        ConfigError: An eighth of the units still has more.
    """
    old = widths_of(config)
    if num_parameters(config) <= target:
        return old
    step = MULTIPLE if old.inner >= MULTIPLE / LEAST else 1
    found: list[tuple[float, Widths]] = []
    fewest = 0
    for fewer in group_counts(config):
        one = num_parameters(narrow_config(config, replace(fewer, inner=step)))
        slope = num_parameters(narrow_config(config, replace(fewer, inner=2 * step))) - one
        inner = min(1 + (target - one) // slope, old.inner // step) * step
        share = inner / old.inner
        fewest = round(one + slope * (LEAST * old.inner / step - 1))
        if share >= LEAST:
            apart = abs(share - fewer.kv_heads / old.kv_heads)
            found.append((apart, replace(fewer, inner=inner)))
    if not found:
        raise ConfigError(
            f"With an eighth of its feed-forward units the student still has {fewest:,} "
            f"parameters, and {target:,} were asked for. Set layers too, or cut hidden by hand."
        )
    return min(found, key=lambda pair: pair[0])[1]


def group_counts(config: PreTrainedConfig) -> Iterator[Widths]:
    """The teacher's widths with fewer and fewer groups of heads, as the family can say them."""
    old = widths_of(config)
    group = old.heads // old.kv_heads
    yield old
    if roles_of(config).free_heads:
        for kv_heads in range(old.kv_heads - 1, 0, -1):
            if old.width % (kv_heads * group) == 0:
                yield replace(old, kv_heads=kv_heads, heads=kv_heads * group)


def halfway_layers(config: PreTrainedConfig, target: int) -> int:
    """Layers of a student that is cut in depth half of the way, by ratio, and in width the rest."""
    whole = num_parameters(config)
    return layers_for(config, round((whole * min(target, whole)) ** 0.5))
