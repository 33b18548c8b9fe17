"""Shapes that meet a target number of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from limbeck.errors import ConfigError
from limbeck.models import PreTrainedConfig
from limbeck.prune.layouts import Widths, cut_config, widths_of
from limbeck.prune.narrow import narrow_config, num_parameters
from limbeck.prune.roles import roles_of

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
MULTIPLES = (256, 32, 8)
"""Feed-forward units are a multiple of the first of these that is small enough: blocks of K-quants
and of `q8_0`, whose formats an export can then use, and what makes matrix products faster."""
MIN_SHARE = 1 / 8
"""Smallest share of the feed-forward units a target may leave."""


def count_of(text: int | str) -> int:
    """A number of parameters from text such as 60M.

    Example:
        >>> count_of("1.5B"), count_of("60M"), count_of(7000)
        (1500000000, 60000000, 7000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB]?)", str(text).strip().upper())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"A number of parameters reads as 60M, 1.5B or 60000000, got {text!r}.")
    return round(float(match[1]) * UNITS[match[2]])


def layers_for(config: PreTrainedConfig, target: int) -> int:
    """The largest number of layers with at most `target` parameters in total."""
    total = int(config.num_hidden_layers)
    one = num_parameters(cut_config(config, [0]))
    block = (num_parameters(config) - one) / max(total - 1, 1)
    if target < one:
        raise ConfigError(
            f"With one layer the student still has {one:,} parameters, more than the requested "
            f"{target:,}: the embeddings are too large. Raise the target, or prune hidden too."
        )
    return min(total, 1 + int((target - one) / block)) if block else total


def widths_for(config: PreTrainedConfig, target: int) -> Widths:
    """The widest shape with at most `target` parameters and the teacher's hidden size.

    For each number of head groups the largest number of feed-forward units is taken; among these
    shapes the one whose shares of kept heads and units are closest wins.
    """
    old = widths_of(config)
    if num_parameters(config) <= target:
        return old
    step = next((each for each in MULTIPLES if old.inner >= each / MIN_SHARE), 1)
    candidates: list[tuple[float, Widths]] = []
    fewest = 0
    for fewer in group_counts(config):
        one = num_parameters(narrow_config(config, replace(fewer, inner=step)))
        per_step = num_parameters(narrow_config(config, replace(fewer, inner=2 * step))) - one
        inner = min(1 + (target - one) // per_step, old.inner // step) * step
        share = inner / old.inner
        fewest = round(one + per_step * (MIN_SHARE * old.inner / step - 1))
        if share >= MIN_SHARE:
            imbalance = abs(share - fewer.kv_heads / old.kv_heads)
            candidates.append((imbalance, replace(fewer, inner=inner)))
    if not candidates:
        raise ConfigError(
            f"With an eighth of its feed-forward units the student still has {fewest:,} "
            f"parameters, more than the requested {target:,}. Set layers or hidden too."
        )
    return min(candidates, key=lambda pair: pair[0])[1]


def group_counts(config: PreTrainedConfig) -> Iterator[Widths]:
    """The teacher's widths with ever fewer head groups, as far as the family supports them."""
    old = widths_of(config)
    group = old.heads // old.kv_heads
    yield old
    if roles_of(config).free_heads:
        for kv_heads in range(old.kv_heads - 1, 0, -1):
            if old.width % (kv_heads * group) == 0:
                yield replace(old, kv_heads=kv_heads, heads=kv_heads * group)


def halfway_layers(config: PreTrainedConfig, target: int) -> int:
    """Layers of a student pruned halfway (geometric mean) in depth, and in width from there."""
    whole = num_parameters(config)
    return layers_for(config, round((whole * min(target, whole)) ** 0.5))
